"""How much each part of a causal estimator helps, and how many keys it reads, on a real model's q, k and v.

    python benchmarks/ingredients.py [--layers 16 20 25] [--rows 48]        # seconds

SmolLM2-135M reads 8192 tokens of Python's argparse; q, k and v of a layer are those of the exact model. Everything is
plain PyTorch, dense over all keys for some rows past token 1024: a way to try an idea before writing a kernel. It
prints the mean number of keys per row (including pooled keys), |estimate - exact| / |exact| for each layer, and the
mean.

Shape letters: Hq query heads, Hk key heads, G = Hq / Hk, R rows, S keys, D head size, P segments.
"""

import argparse
from dataclasses import dataclass

import torch
from language_model import entering, load, queries_keys_values, read
from torch.nn.functional import normalize, one_hot

from kernels.hyper_attention.plan.lsh import gray_buckets, projections

TOKENS, SINKS, STEP = 8192, 4, 256


@dataclass
class Layer:
    """q [Hk, G * R, D] of the rows at `position` [R]; all q [Hq, S, D]; k, v [Hk, S, D]; logits [Hk, G, R, S]."""

    q: torch.Tensor
    every_q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    logits: torch.Tensor
    position: torch.Tensor

    def window(self, size):
        """First key of each row's window, [R], and which keys of the window and the sinks are read, [R, S]."""
        start = (self.position // STEP * STEP - size).clamp(min=0)
        key = torch.arange(self.k.shape[1])
        past = key <= self.position[:, None]
        return start, past & ((key >= start[:, None]) | (key < SINKS))

    def older(self, start):
        key = torch.arange(self.k.shape[1])
        return (key >= SINKS) & (key < start[:, None])


def layer_of(model, ids, layer, rows):
    q, k, v = (x[0] for x in queries_keys_values(model, entering(model, "argparse", ids, layer), layer))
    position = (1024 + (torch.arange(rows) + 0.5) * (TOKENS - 1024) / rows).long()
    of_rows = q[:, position].reshape(k.shape[0], -1, q.shape[-1])
    logits = (of_rows @ k.mT * q.shape[-1] ** -0.5).view(k.shape[0], -1, rows, TOKENS)
    return Layer(of_rows, q, k, v, logits, position)


def attend(x, read, means=None, values=None, mean_read=None, log_weight=0.0):
    """Outputs [Hk, G * R, D] and mean number of keys: exact where `read`, plus weighted further keys."""
    logits = (x.logits + log_weight).masked_fill(~read, -torch.inf)
    v, keys = x.v, read.expand_as(x.logits).sum(-1).float().mean().item()
    if means is not None:
        logits = torch.cat([logits, means.masked_fill(~mean_read, -torch.inf)], -1)
        v = torch.cat([v, values], 1)
    return logits.softmax(-1).flatten(1, 2) @ v, keys


def pooled(x, start, length, variance=False):
    """Logits of segment means with log count [Hk, G, R, P], mean values, and which are before the window [R, P]."""
    segments = [y.view(y.shape[0], -1, length, y.shape[-1]) for y in (x.k, x.v)]
    share = (torch.arange(TOKENS) >= SINKS).float().view(-1, length)
    count = share.sum(-1)
    key, value = ((y * share[..., None]).sum(2) / count[:, None] for y in segments)
    scale = x.q.shape[-1] ** -0.5
    logits = scale * x.q @ key.mT + count.log()
    if variance:
        spread = ((segments[0] - key[:, :, None]).square() * share[..., None]).sum(2) / count[:, None]
        logits = logits + 0.5 * scale**2 * x.q.square() @ spread.mT
    whole = (torch.arange(len(count)) + 1) * length <= start[:, None]
    return logits.view(*x.logits.shape[:3], -1), value, whole


def windowed(size=1024, length=0, variance=False):
    def run(x):
        start, read = x.window(size)
        if not length:
            return attend(x, read)
        means, values, whole = pooled(x, start, length, variance)
        out, keys = attend(x, read, means, values, whole)
        return out, keys + whole.sum(-1).float().mean().item()

    return run


def chosen(length, most, size, residual="once"):
    """Segments whose means have the largest logits are read key by key; the others as means, or ("none") not at all."""

    def run(x):
        start, read = x.window(size)
        means, values, whole = pooled(x, start, length)
        best = means.masked_fill(~whole, -torch.inf).topk(most, -1).indices
        choice = torch.zeros_like(means, dtype=torch.bool).scatter_(-1, best, True) & whole
        read = read | (choice.repeat_interleave(length, -1) & (torch.arange(TOKENS) >= SINKS))
        seen = {"once": whole & ~choice, "twice": whole, "none": torch.zeros_like(whole)}[residual]
        out, keys = attend(x, read, means, values, seen)
        return out, keys + whole.sum(-1).float().mean().item()

    return run


def oracle(most, size=1024):
    """The older keys of largest logits, as a perfect look-back would find them."""

    def run(x):
        start, read = x.window(size)
        best = x.logits.masked_fill(~x.older(start), -torch.inf).topk(most, -1).indices
        return attend(
            x, read | (torch.zeros_like(x.logits, dtype=torch.bool).scatter_(-1, best, True) & x.older(start))
        )

    return run


def lsh(bits, rounds=1, most=256, centre="both", balance=False, size=1024):
    """The newest keys of the query's own bucket; hash values depend on a token and on the first `size` tokens."""

    def run(x):
        start, read = x.window(size)
        older = x.older(start)
        k, q = x.k, x.q
        groups = q.shape[0], -1, q.shape[-1]
        mean_k = k[:, SINKS:size].mean(1, keepdim=True)
        mean_q = x.every_q[:, SINKS:size].reshape(groups).mean(1, keepdim=True)
        k = k - mean_k if centre != "none" else k
        q = q - mean_q if centre == "both" else q
        projection = projections(0, rounds, k.shape[0], k.shape[2], bits, k.device)
        if balance:
            to_q, to_k = balanced(x.every_q[:, SINKS:size].reshape(groups) - mean_q, k[:, SINKS:size])
            q, k = q @ to_q, k @ to_k
            projection = torch.eye(k.shape[2])[:, :bits].expand(k.shape[0], -1, -1).repeat(1, 1, rounds)
        query_bucket, key_bucket = (gray_buckets(y[None], projection, rounds)[:, 0] for y in (q, k))
        for number in range(rounds):
            same = query_bucket[number].view(*x.logits.shape[:3], 1) == key_bucket[number][:, None, None]
            same = same & older
            read = read | (same & (same.flip(-1).cumsum(-1).flip(-1) <= most // rounds))
        return attend(x, read)

    return run


def balanced(q, k):
    """Maps of q and k that keep q . k and give both the same diagonal covariance, largest first."""
    cov_q, cov_k = (y.mT @ y / y.shape[1] for y in (q, k))
    root = torch.linalg.cholesky(
        cov_q + 0.01 * cov_q.diagonal(dim1=1, dim2=2).mean(-1)[:, None, None] * torch.eye(q.shape[2])
    )
    values, vectors = torch.linalg.eigh(root.mT @ cov_k @ root)
    size = values.clamp(min=1e-6).sqrt().sqrt()[:, None]
    return (torch.linalg.inv(root).mT @ vectors * size).flip(-1), (root @ vectors / size).flip(-1)


def buckets_of_centroids(count, probes=1, most=256, size=1024, turns=4):
    """Learned buckets: k-means of the first window's keys; a query looks into the buckets of its best centroids."""

    def run(x):
        start, read = x.window(size)
        centre = x.k[:, SINKS:size].mean(1, keepdim=True)
        sample = x.k[:, SINKS:size] - centre
        centroid = sample[:, torch.linspace(0, sample.shape[1] - 1, count).long()]
        for _ in range(turns):
            member = one_hot(nearest(sample, centroid), count).float()
            total = member.sum(1)[..., None]
            centroid = torch.where(total > 0, member.mT @ sample / total.clamp(min=1), centroid)
        bucket = nearest(x.k - centre, centroid)
        best = (x.q @ centroid.mT).topk(probes, -1).indices.view(*x.logits.shape[:3], probes)
        for probe in range(probes):
            same = (bucket[:, None, None] == best[..., probe : probe + 1]) & x.older(start)
            read = read | (same & (same.flip(-1).cumsum(-1).flip(-1) <= most // probes))
        return attend(x, read)

    return run


def nearest(points, centroids):
    return (centroids.square().sum(-1)[:, None] - 2 * points @ centroids.mT).argmin(-1)


def scored(score, most=8, block=256, size=1024):
    """Global keys: in each block of older keys, the keys of largest score, for all queries (arXiv:2505.11040)."""

    def run(x):
        start, read = x.window(size)
        k = x.k - x.k[:, SINKS:size].mean(1, keepdim=True)
        if score == "leverage":
            gram = k[:, SINKS:size].mT @ k[:, SINKS:size] / size + 0.01 * torch.eye(k.shape[2])
            points = (k @ torch.linalg.inv(gram) * k).sum(-1)
        elif score == "value norm":
            points = x.v.norm(dim=-1)
        else:
            points = (x.k @ x.every_q[:, SINKS:size].reshape(k.shape[0], -1, k.shape[2]).mean(1)[..., None])[..., 0]
        points = points.view(k.shape[0], -1, block)
        best = (points >= points.topk(most, -1).values[..., -1:]).flatten(1)[:, None, None]
        return attend(x, read | (best & x.older(start)))

    return run


def sampled(length, by="uniform", size=1024):
    """One key stands for each older segment, drawn uniformly or by value norm, with weight 1 / probability."""

    def run(x):
        start, read = x.window(size)
        chance = torch.ones_like(x.v[..., 0]) if by == "uniform" else x.v.norm(dim=-1)
        chance = normalize((chance * (torch.arange(TOKENS) >= SINKS)).reshape(-1, length), p=1, dim=-1)
        drawn = torch.multinomial(chance, 1, generator=torch.Generator().manual_seed(0))
        weight = torch.full_like(chance, -torch.inf).scatter_(1, drawn, -chance.gather(1, drawn).log())
        weight = weight.view(x.k.shape[0], 1, 1, -1)
        whole = (torch.arange(TOKENS) // length + 1) * length <= start[:, None]
        older = (weight > -torch.inf) & whole
        return attend(x, read | older, log_weight=torch.where(older, weight, 0.0))

    return run


TRIALS = {
    "window 1024 + 4 sinks": windowed(),
    "window 1280": windowed(1280),
    "+ means of 128": windowed(length=128),
    "+ means of 64": windowed(length=64),
    "+ means of 32": windowed(length=32),
    "+ means of 16": windowed(length=16),
    "+ means of 64 with variance term": windowed(length=64, variance=True),
    "+ means of 16 with variance term": windowed(length=16, variance=True),
    "+ 1 sample of 64": sampled(64),
    "+ 1 sample of 16": sampled(16),
    "+ 1 sample of 16 by value norm": sampled(16, "value norm"),
    "+ LSH, 7 bits, no centre": lsh(7, centre="none"),
    "+ LSH, 7 bits": lsh(7),
    "+ LSH, 4 bits, no centre": lsh(4, centre="none"),
    "+ LSH, 4 bits, keys centred": lsh(4, centre="keys"),
    "+ LSH, 4 bits": lsh(4),
    "+ LSH, 1 bit": lsh(1),
    "+ LSH, 4 rounds of 4 bits, 64 keys each": lsh(4, 4),
    "+ signs of 4 balanced directions": lsh(4, balance=True),
    "+ k-means buckets, 8": buckets_of_centroids(8),
    "+ k-means buckets, 32": buckets_of_centroids(32),
    "+ k-means buckets, 128, 8 probed": buckets_of_centroids(128, 8),
    "+ 8 of 256 keys by leverage": scored("leverage"),
    "+ 8 of 256 keys by value norm": scored("value norm"),
    "+ 8 of 256 keys by mean query": scored("mean query"),
    "window 1024, 4 segments of 32": chosen(32, 4, 1024),
    "window 1024, 2 segments of 64": chosen(64, 2, 1024),
    "window 768, 8 segments of 16": chosen(16, 8, 768),
    "window 512, 16 segments of 16": chosen(16, 16, 512),
    "window 768, 12 segments of 32": chosen(32, 12, 768),
    "window 768, 8 segments of 64": chosen(64, 8, 768),
    "window 768, 8 segments of 64, means of all": chosen(64, 8, 768, "twice"),
    "window 768, 8 segments of 64, no means": chosen(64, 8, 768, "none"),
    "window 512, 12 segments of 64": chosen(64, 12, 512),
    "window 768, 4 segments of 128": chosen(128, 4, 768),
    "+ best 32 older keys": oracle(32),
    "+ best 256 older keys": oracle(256),
}


@torch.inference_mode()
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[16, 20, 25])
    parser.add_argument("--rows", type=int, default=48)
    arguments = parser.parse_args()
    model, tokenizer = load()
    ids = read(tokenizer, "argparse", TOKENS)
    layers = [layer_of(model, ids, layer, arguments.rows) for layer in arguments.layers]
    exact = [attend(x, torch.arange(TOKENS) <= x.position[:, None])[0] for x in layers]
    print(f"| ingredient | keys | {' | '.join(f'layer {n}' for n in arguments.layers)} | mean |")
    print(f"|---|---:|{'---:|' * len(layers)}---:|")
    for name, run in TRIALS.items():
        found = [run(x) for x in layers]
        errors = [((out - truth).norm() / truth.norm()).item() for (out, _), truth in zip(found, exact, strict=True)]
        keys = sum(keys for _, keys in found) / len(found)
        shown = " | ".join(f"{error:.3f}" for error in [*errors, sum(errors) / len(errors)])
        print(f"| {name} | {keys:.0f} | {shown} |", flush=True)


if __name__ == "__main__":
    main()
