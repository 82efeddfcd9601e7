"""Error of HyperAttention's outputs on a language model's own queries, keys and values, by layer.

    python benchmarks/output_error.py [--layers 0 5 10 15 20 25 29]

SmolLM2-135M reads 8192 tokens of Python's argparse; each layer's q, k and v are those of the exact model. It prints
|approximate - exact| / |exact| (Frobenius norm over heads) on rows past token 1024, causal and without a mask.
"""

import argparse

import torch
from language_model import entering, load, queries_keys_values, read
from perplexity import ROWS, SCORED_FROM, TOKENS

from kernels.hyper_attention import HyperAttentionConfig, hyper_attention

FULL = {
    "paper, no mask": HyperAttentionConfig(),
    "paper, no mask, 1024 samples": HyperAttentionConfig(num_samples=1024),
    "paper, no mask, 512 + 512": HyperAttentionConfig(block_size=512, num_samples=512),
    "blocks only, no mask": HyperAttentionConfig(num_samples=0),
    "samples only, no mask": HyperAttentionConfig(block_size=1, num_samples=512),
}


def exact_rows(q, k, v, rows, causal):
    """Exact attention of some rows, [1, Hq, rows, D]."""
    groups = q.shape[1] // k.shape[1]
    key, value = (x.repeat_interleave(groups, 1) for x in (k, v))
    logits = q[:, :, rows] @ key.mT * q.shape[-1] ** -0.5
    if causal:
        logits = logits.masked_fill(torch.arange(k.shape[2]) > rows[:, None], -torch.inf)
    return logits.softmax(-1) @ value


@torch.inference_mode()
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[0, 5, 10, 15, 20, 25, 29])
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model, tokenizer = load()
    ids = read(tokenizer, "argparse", TOKENS)
    rows = torch.linspace(SCORED_FROM, TOKENS - 1, arguments.rows).long()
    configs = [(name, config, True) for name, config in ROWS.items() if config]
    configs += [(name, config, False) for name, config in FULL.items()]
    print(f"| layer | {' | '.join(name for name, *_ in configs)} |\n|---:|{'---:|' * len(configs)}")
    for layer in arguments.layers:
        q, k, v = queries_keys_values(model, entering(model, "argparse", ids, layer), layer)
        truth = {causal: exact_rows(q, k, v, rows, causal) for causal in (True, False)}
        errors = []
        for _, config, causal in configs:
            out = hyper_attention(q, k, v, causal, config=config)[:, :, rows]
            errors.append(f"{((out - truth[causal]).norm() / truth[causal].norm()).item():.3f}")
        print(f"| {layer} | {' | '.join(errors)} |", flush=True)


if __name__ == "__main__":
    main()
