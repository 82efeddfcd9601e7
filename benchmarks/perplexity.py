"""The loss of a language model with HyperAttention: perplexity by number of patched layers, as in the paper's Figure 3.

    python benchmarks/perplexity.py                                   # the table of the last 15 layers
    python benchmarks/perplexity.py --layers last:5 last:15 all       # the figure
    python benchmarks/perplexity.py --only ours window=1024,segment=16,lookback=0

SmolLM2-135M in float32 reads the sources of Python's argparse and tarfile, 8192 tokens each; tokens past 1024 are
scored, so that most of them have keys outside any window. Perplexity is exp of the mean loss in nats over both (the
authors' script uses base 2). Losses are kept under runs/perplexity by configuration, and no row is computed twice.
First it checks that a patched model whose estimator covers all keys equals the plain model.
"""

import argparse
import hashlib
import json
import math
from dataclasses import asdict
from pathlib import Path

import torch
from language_model import FOLDER, entering, load, nats, queries_keys_values, read, run_layers

from kernels.hyper_attention import HyperAttentionConfig
from kernels.hyper_attention.documents import whole
from kernels.hyper_attention.huggingface import patched_attention
from kernels.hyper_attention.plan.causal_local import build_local_plan
from kernels.hyper_attention.plan.nominate import build_nominated_plan
from kernels.hyper_attention.plan.tables import build_plan

TOKENS, SCORED_FROM = 8192, 1024
TEXTS = ("argparse", "tarfile")
COLOURS = ("#2ca02c", "#ff7f0e", "#1f77b4", "#d62728", "#9467bd")
NO_MORE = {"segment": 0, "lookback": 0}


def local(**sizes):
    return HyperAttentionConfig(**{"mode": "causal_local", "exact_below": 1024, **sizes})


ROWS = {
    "exact": None,
    "window 1024": local(window=1024, num_sinks=0, **NO_MORE),
    "window 1024 + 4 sinks": local(window=1024, **NO_MORE),
    "paper, leaf 1024": HyperAttentionConfig(leaf=1024, exact_below=1024),
    "ours": local(),
    "ours, means": local(choice="means", window=640),
}


def named(row):
    """The configuration of a row: a name of `ROWS`, or "field=value,..." of mode causal_local."""
    if row in ROWS:
        return ROWS[row]
    pairs = (part.split("=") for part in row.split(","))
    return local(**{name: value if name == "choice" else int(value) for name, value in pairs})


def losses(model, module, ids, config, layers):
    """Nats of the scored tokens, a list of floats, from the file of this configuration if it exists."""
    with patched_attention(
        model, config or HyperAttentionConfig(exact_below=TOKENS), layers if config else []
    ) as chosen:
        key = json.dumps([module, TOKENS, config and asdict(config), chosen], sort_keys=True)
        file = FOLDER / f"nats-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"
        if file.exists():
            return json.loads(file.read_text())["nats"]
        count = len(model.model.layers)
        first = min(chosen, default=count)
        hidden = entering(model, module, ids, first)
        for state in run_layers(model, hidden, range(first, count)):
            hidden = state
    found = nats(model, hidden, ids)[SCORED_FROM:].tolist()
    file.write_text(json.dumps({"key": json.loads(key), "nats": found}))
    return found


def gate(model, ids):
    """Exit unless a patched model whose estimator covers all keys equals the plain model."""
    with torch.inference_mode():
        hidden = model.model.embed_tokens(ids)
    everything = range(len(model.model.layers))
    *_, plain = run_layers(model, hidden, everything)
    with patched_attention(model, local(window=ids.shape[1], exact_below=0)):
        *_, covered = run_layers(model, hidden, everything)
    if not torch.allclose(nats(model, plain, ids), nats(model, covered, ids), atol=1e-3):
        raise SystemExit("check failed: a window over all keys is not exact attention; no perplexity is reported")


def keys_of_a_query(config, q, k):
    """Largest number of keys, including pooled ones, that a query of q and k reads; and the mean over scored tokens."""
    documents = whole(1, TOKENS, q.device)
    if config.mode == "paper":
        plan = build_plan(q, k, True, documents, config)
        keys = (plan.band.stop - plan.band.start)[:, None].expand(q.shape[:3])
        for level in plan.levels:
            inside = level.query_segment >= 0
            keys = keys + (inside * (level.block.stop - level.block.start + config.num_samples))[:, None]
    else:
        build = build_nominated_plan if config.nominates else build_local_plan
        plan = build(q, k, documents, config)
        bands = [band for band in (plan.band, plan.sinks, plan.pooled and plan.pooled.band) if band is not None]
        keys = sum((band.stop - band.start)[:, None].expand(q.shape[:3]) for band in bands)
        for lookback in plan.lookbacks:
            read = (lookback.band.stop - lookback.band.start).to(keys.dtype)
            keys = keys + torch.zeros_like(keys).scatter_(2, lookback.query_order.long(), read)
        if plan.lists is not None:
            listed = plan.lists.read(plan.pooled.start.shape[1], k.shape[2] - q.shape[2]) < plan.pooled.start.shape[1]
            keys = keys + listed.sum(-1) * config.segment
    return int(keys.max()), keys[:, :, SCORED_FROM:].float().mean().item()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", nargs="+", default=["last:15"], help="as in patched_attention")
    parser.add_argument("--only", nargs="+", default=list(ROWS), help='names of rows, or "window=512,segment=16,..."')
    parser.add_argument("--texts", nargs="+", default=TEXTS, help="modules of the standard library")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--figure", type=Path, help="write the plot over the number of patched layers, SVG")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model, tokenizer = load()
    texts = {module: read(tokenizer, module, TOKENS) for module in arguments.texts}
    gate(model, next(iter(texts.values()))[:, :600])
    middle = len(model.model.layers) // 2
    module, ids = next(iter(texts.items()))
    q, k, _ = queries_keys_values(model, entering(model, module, ids, middle), middle)
    exact = [mean(losses(model, module, ids, None, [])) for module, ids in texts.items()]
    points = []
    print(f"| attention | layers | nats {' | nats '.join(texts)} | perplexity | over exact | keys, most | keys, mean |")
    print("|---|---|" + "---:|" * (len(texts) + 4))
    for row in arguments.only:
        config = named(row)
        keys = ("-", "-") if config is None else "{:.0f} {:.0f}".format(*keys_of_a_query(config, q, k)).split()
        for layers in arguments.layers if config else ["none"]:
            found = [mean(losses(model, module, ids, config, layers)) for module, ids in texts.items()]
            perplexity, over = math.exp(mean(found)), math.exp(mean(found) - mean(exact)) - 1
            with patched_attention(model, config or local(), layers if config else []) as patched:
                points.append((row, len(patched), perplexity))
            each = " | ".join(f"{value:.4f}" for value in found)
            numbers = f"{each} | {perplexity:.3f} | {100 * over:+.1f} % | {keys[0]} | {keys[1]}"
            print(f"| {row} | {layers} | {numbers} |", flush=True)
    if arguments.figure:
        arguments.figure.write_text(figure(points))


def figure(points):
    """Perplexity over the number of patched layers, as SVG; the exact model is the dashed line."""
    width, height, margin = 640, 380, 56
    low, high = min(p[2] for p in points), max(p[2] for p in points)
    low, high, most = math.floor(low), math.ceil(high), max(p[1] for p in points)

    def place(layers, perplexity):
        share = math.log(perplexity / low) / math.log(high / low)
        return margin + layers / most * (width - 4 * margin), height - margin - share * (height - 2 * margin)

    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif">']
    parts.append(f'<rect width="{width}" height="{height}" fill="white"/><g font-size="12" fill="#222">')
    for tick in sorted({low, low + 1, high, *(x for x in (6, 8, 10, 15, 20, 30, 50, 100) if low < x < high)}):
        (x, y), (end, _) = place(0, tick), place(most, tick)
        parts.append(f'<line x1="{x:.1f}" x2="{end:.1f}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>')
        parts.append(f'<text x="{x - 8:.1f}" y="{y + 4:.1f}" text-anchor="end">{tick}</text>')
    for layers in sorted({p[1] for p in points}):
        x, _ = place(layers, low)
        parts.append(f'<text x="{x:.1f}" y="{height - margin + 20}" text-anchor="middle">{layers}</text>')
    exact = [p[2] for p in points if p[1] == 0]
    for number, row in enumerate(dict.fromkeys(p[0] for p in points if p[1])):
        line = sorted([(0, exact[0])] * bool(exact) + [p[1:] for p in points if p[0] == row])
        path = " ".join("{:.1f},{:.1f}".format(*place(*point)) for point in line)
        colour = COLOURS[number % len(COLOURS)]
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        x, y = place(*line[-1])
        parts.append(f'<text x="{x + 6:.1f}" y="{y + 4:.1f}" fill="{colour}">{row} {line[-1][1]:.2f}</text>')
    title = f"perplexity (log scale) over patched layers, the last ones first; {TOKENS} tokens"
    parts.append(f'<text x="{margin}" y="24">{title}</text></g></svg>')
    return "\n".join(parts) + "\n"


def mean(values):
    return sum(values) / len(values)


if __name__ == "__main__":
    main()
