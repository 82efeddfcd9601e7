"""The norm of NEFTune's noise on each document: the hook of transformers beside ours, padded and packed.

    python benchmarks/noise_norms.py

Both hooks run on one embedding in training mode; the noise is the output minus the rows of the weights. Expected is
alpha / sqrt(3), whatever the length of a document.
"""

import math
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))

import torch
from torch import nn
from transformers.integrations.neftune import neftune_post_forward_hook

from kernels.neftune import NoiseBatch, batch_of_pack, neftune

ALPHA, SIZE, DRAWS = 5.0, 576, 200


def padded(lengths):
    """Rows padded to the longest: the batch for our hook, the tokens, and where each document lies."""
    tokens, count = max(lengths), len(lengths)
    positions = torch.arange(tokens)[None].expand(count, tokens)
    rows = torch.arange(count)[:, None].expand_as(positions)
    sizes = torch.tensor(lengths)
    batch = NoiseBatch(rows, positions, sizes, torch.arange(count), positions >= sizes[:, None], 0, count)
    return batch, torch.zeros(count, tokens, dtype=torch.long), [(row, 0, size) for row, size in enumerate(lengths)]


def packed(lengths, tokens):
    """The documents one after the other in one row of `tokens`."""
    ends = torch.tensor(lengths).cumsum(0).tolist()
    spans = [(0, end - size, end) for end, size in zip(ends, lengths, strict=True)]
    batch = batch_of_pack(lengths, [*range(len(lengths))], tokens, 0)
    return batch, torch.zeros(1, tokens, dtype=torch.long), spans


def norms(embedding, tokens, spans, draws):
    """Mean norm of the noise on each document."""
    sums = torch.zeros(len(spans))
    for _ in range(draws):
        noise = embedding(tokens) - embedding.weight[tokens]
        sums += torch.stack([noise[row, begin:end].norm() for row, begin, end in spans]).detach()
    return (sums / draws).tolist()


def main():
    torch.manual_seed(0)
    embedding = nn.Embedding(10, SIZE).train()
    embedding.neftune_noise_alpha = ALPHA
    print(f"alpha {ALPHA}, {SIZE} dimensions, expected {ALPHA / math.sqrt(3):.2f}\n")
    print("| batch | document, tokens | transformers' hook | ours |\n|---|---:|---:|---:|")
    cases = {
        "four rows padded to 11": padded([11, 10, 7, 4]),
        "one pack of 4,096": packed([2000, 1500, 350, 130, 20], 4096),
    }
    for name, (batch, tokens, spans) in cases.items():
        handle = embedding.register_forward_hook(neftune_post_forward_hook)
        theirs = norms(embedding, tokens, spans, DRAWS if tokens.numel() < 1000 else 5)
        handle.remove()
        with neftune(embedding, ALPHA, seed=0) as noise:
            noise.set_batch(batch)
            ours = norms(embedding, tokens, spans, 1)
        for (_, begin, end), one, other in zip(spans, theirs, ours, strict=True):
            print(f"| {name} | {end - begin:,} | {one:.2f} | {other:.2f} |")


if __name__ == "__main__":
    main()
