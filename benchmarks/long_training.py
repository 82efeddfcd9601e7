"""Training SmolLM2-135M on long sequences on a CPU: exact attention against HyperAttention in the last layers.

    python benchmarks/long_training.py step      # one step of 8192 tokens with each attention: seconds, memory, loss
    python benchmarks/long_training.py adapt     # 30 steps: does the gap to exact attention shrink?

step: forward, backward and AdamW of the whole model, with activation checkpointing by layer. Each attention runs in its
own process, so that its peak memory can be measured. adapt: the last layers are trained with HyperAttention, float32,
on other sources of the standard library; the loss of the held-out text is measured with HyperAttention and with exact
attention before, during and after. The layers below are not trained, and are computed once.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time

import torch
from language_model import load, nats, read, run_layers
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from kernels.hyper_attention import HyperAttentionConfig
from kernels.hyper_attention.huggingface import patched_attention

TRAINED = ("inspect", "typing", "subprocess", "zipfile", "logging", "unittest.mock", "pathlib", "threading")
HELD_OUT = "tarfile"
HEAD_ROWS = 1024


def loss_of(model, hidden, ids):
    """Mean nats of the next tokens; only the logits of one chunk exist at a time, also in the backward pass."""
    hidden = model.model.norm(hidden)[0, :-1]

    def chunk(rows, targets):
        return cross_entropy(model.lm_head(rows), targets, reduction="sum")

    pieces = zip(hidden.split(HEAD_ROWS), ids[0, 1:].split(HEAD_ROWS), strict=True)
    total = sum(checkpoint(chunk, rows, targets, use_reentrant=False) for rows, targets in pieces)
    return total / (ids.shape[1] - 1)


def trained_layers(model, hidden, layers):
    position = torch.arange(hidden.shape[1])[None]
    rotation = model.model.rotary_emb(hidden, position_ids=position)

    def run(layer, state):
        return model.model.layers[layer](state, position_ids=position, position_embeddings=rotation)

    for layer in layers:
        hidden = checkpoint(run, layer, hidden, use_reentrant=False)
    return hidden


def step(model, tokenizer, arguments, config):
    """Seconds of one training step, peak memory in MB and loss."""
    ids = read(tokenizer, "argparse", arguments.tokens)
    optimizer = torch.optim.AdamW(model.parameters(), lr=arguments.learning_rate)
    with patched_attention(model, config, arguments.layers):
        begin, began = time.perf_counter(), time.process_time()
        loss = loss_of(model, trained_layers(model, model.model.embed_tokens(ids), range(len(model.model.layers))), ids)
        forward = time.perf_counter() - begin
        loss.backward()
        optimizer.step()
    return {
        "forward_s": round(forward, 1),
        "step_s": round(time.perf_counter() - begin, 1),
        "cpu_s": round(time.process_time() - began, 1),
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "loss": round(loss.item(), 4),
    }


def steps(arguments):
    for name in ("exact", "ours"):
        command = [sys.executable, __file__, "cell", "--attention", name, "--tokens", str(arguments.tokens)]
        command += ["--layers", arguments.layers, "--threads", str(arguments.threads)]
        command += ["--window", str(arguments.window), "--lookback", str(arguments.lookback)]
        # The command consists of this file and the arguments of its own command line.
        subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": str(arguments.threads)}, check=True)  # noqa: S603


def adapt(model, tokenizer, arguments, config):
    """Train the patched layers, and print held-out nats past the window with HyperAttention and exact attention."""
    with patched_attention(model, config, arguments.layers) as chosen:
        pass
    layers = range(min(chosen), len(model.model.layers))
    texts = {module: read(tokenizer, module, arguments.tokens) for module in (*TRAINED, HELD_OUT)}
    with torch.inference_mode():
        embedded = {module: model.model.embed_tokens(ids) for module, ids in texts.items()}
    entering = {module: _last(state, run_layers(model, state, range(layers[0]))) for module, state in embedded.items()}
    entering = {module: state.clone() for module, state in entering.items()}
    parameters = [p for layer in layers for p in model.model.layers[layer].parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=arguments.learning_rate, weight_decay=0.0)
    for number in range(arguments.steps + 1):
        if number % arguments.every == 0:
            print(json.dumps({"step": number, **held_out(model, texts, entering, layers, config, chosen)}), flush=True)
        if number == arguments.steps:
            return
        module = TRAINED[number % len(TRAINED)]
        with patched_attention(model, config, chosen):
            loss = loss_of(model, trained_layers(model, entering[module], layers), texts[module])
            optimizer.zero_grad()
            loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()


def held_out(model, texts, entering, layers, config, chosen):
    """Nats of the held-out text past the window, with HyperAttention, with exact attention, and their difference."""
    found = {}
    for name, patched in (("ours", chosen), ("exact", [])):
        with patched_attention(model, config, patched):
            hidden = _last(entering[HELD_OUT], run_layers(model, entering[HELD_OUT], layers))
        found[name] = nats(model, hidden, texts[HELD_OUT])[config.window :].mean().item()
    return {name: round(value, 4) for name, value in found.items()} | {"gap": round(found["ours"] - found["exact"], 4)}


def _last(entering, states):
    """The output of the last layer, or the input if there is no layer."""
    *_, state = entering, *states
    return state


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["step", "adapt", "cell"])
    parser.add_argument("--attention", default="ours", choices=["exact", "ours"], help=argparse.SUPPRESS)
    parser.add_argument("--tokens", type=int, help="8192 for step, 4096 for adapt")
    parser.add_argument("--layers", default="last:15")
    parser.add_argument("--window", type=int, help="the default for step, 256 for adapt")
    parser.add_argument(
        "--lookback", type=int, default=HyperAttentionConfig.lookback, help="0: older keys as means only"
    )
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--every", type=int, default=10, help="steps between readings of the held-out text")
    parser.add_argument("--learning-rate", type=float, default=1e-5)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    adapts = arguments.what == "adapt"
    arguments.tokens = arguments.tokens or (4096 if adapts else 8192)
    arguments.window = arguments.window or (256 if adapts else HyperAttentionConfig.window)
    torch.set_num_threads(arguments.threads)
    if arguments.what == "step":
        steps(arguments)
        return
    sizes = {"window": arguments.window, "lookback": arguments.lookback, "exact_below": arguments.window}
    ours = HyperAttentionConfig(mode="causal_local", **sizes)
    model, tokenizer = load()
    if adapts:
        adapt(model, tokenizer, arguments, ours)
        return
    config = ours if arguments.attention == "ours" else HyperAttentionConfig(exact_below=arguments.tokens)
    print(json.dumps({"attention": arguments.attention, **step(model, tokenizer, arguments, config)}), flush=True)


if __name__ == "__main__":
    main()
