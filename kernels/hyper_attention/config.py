"""The settings of HyperAttention, checked when they are made."""

import json
from dataclasses import asdict, dataclass
from typing import Literal


@dataclass(frozen=True)
class HyperAttentionConfig:
    """What `hyper_attention` computes; two calls of our kernels with equal settings and inputs agree bit for bit.

    Attributes:
        mode: "paper" is Algorithms 1-4 of arXiv:2310.05869; "causal_local" is ours, strictly causal.
        block_size: paper: keys that each query reads exactly from the sorted order; as many queries share them.
        num_samples: paper: keys drawn from those outside the block; 0: keys outside the block are not read.
        num_projections: sign bits of the angular LSH; there are two to this power of buckets.
        leaf: paper, causal: the recursion ends in exact causal attention over this many tokens. The authors use 4096,
            a co-author 2048; a smaller leaf is faster and less exact.
        window: causal_local: minimum number of exact keys before a query; rounded up to the edge of a segment.
        num_sinks: causal_local: first tokens of each document, exact for all its queries.
        lookback: causal_local: older keys, found by content, that are exact for the query; 0: none. With choice
            "nominated" a list holds up to six times as many, and seldom more than three times on real text.
        choice: causal_local: how the look-back finds its keys. "nominated": each query names the segments whose mean
            keys have its largest logits; a row of a tile of 128 queries reads, key by key, what the rows up to itself
            and the tile before named; the fastest on a GPU. "means": each query chooses for itself the lookback /
            segment segments (rounded down, at least one) whose mean keys have its largest logits. "lsh": the newest
            keys of the query's own LSH bucket, which stay in their means too. With segment = 0 it is always "lsh".
        segment: causal_local: tokens of one pooled segment of older keys, more than num_sinks; 0: no pooled keys. With
            choice "nominated" a power of two from 16. A query reads one mean per segment: beyond 32k tokens, n / 1024
            keeps that work constant.
        nominations: causal_local, choice "nominated": segments that each query names, 1 or 2.
        exact_below: documents of at most this many keys get exact attention. "auto": on a CPU 4096; on a GPU the
            measured length below which exact attention is faster (`routing.py`). Torch's own exact kernels take a call
            whose documents are all that short.
        seed: determines projections and samples.

    Raises:
        ValueError: a value is out of range; the message names the argument, the value and the limit.
    """

    mode: Literal["paper", "causal_local"] = "paper"
    block_size: int = 256
    num_samples: int = 256
    num_projections: int = 7
    leaf: int = 1024
    window: int = 512
    num_sinks: int = 4
    lookback: int = 512
    choice: Literal["nominated", "means", "lsh"] = "nominated"
    segment: int = 32
    nominations: int = 2
    exact_below: int | Literal["auto"] = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.mode not in ("paper", "causal_local"):
            raise ValueError(f"hyper_attention: mode is {self.mode!r}; it must be 'paper' or 'causal_local'")
        if self.choice not in ("nominated", "means", "lsh"):
            raise ValueError(f"hyper_attention: choice is {self.choice!r}; it must be 'nominated', 'means' or 'lsh'")
        limits = {
            "block_size": (1, 65536),
            "num_samples": (0, 65536),
            "num_projections": (1, 10),
            "leaf": (1, 1 << 20),
            "window": (1, 1 << 30),
            "num_sinks": (0, 1024),
            "lookback": (0, 65536),
            "segment": (0, 65536),
            "nominations": (1, 2),
            "exact_below": (0, 1 << 62),
            "seed": (-(1 << 63), (1 << 63) - 1),
        }
        for name, (low, high) in limits.items():
            value = getattr(self, name)
            if name == "exact_below" and value == "auto":
                continue
            if type(value) is not int:
                raise ValueError(f"hyper_attention: {name} is {value!r}; it must be an integer from {low} to {high}")
            if not low <= value <= high:
                raise ValueError(f"hyper_attention: {name} is {value}; it must be from {low} to {high}")
        if 0 < self.segment <= self.num_sinks:
            raise ValueError(f"hyper_attention: segment is {self.segment}; it must exceed num_sinks, {self.num_sinks}")
        if self.nominates and (self.segment < 16 or self.segment & (self.segment - 1)):
            raise ValueError(
                f"hyper_attention: segment is {self.segment}; with choice 'nominated' it must be a power of two from 16"
            )
        # Made once, here: torch.compile takes a string for a constant, but not the numbers in it.
        object.__setattr__(self, "_json", json.dumps(asdict(self)))

    @property
    def nominates(self) -> bool:
        """Whether a tile of queries reads the segments that its rows nominate."""
        return self.mode == "causal_local" and self.choice == "nominated" and self.segment > 0

    def to_json(self) -> str:
        """The settings as JSON; `HyperAttentionConfig(**json.loads(text))` restores them."""
        text: str = vars(self)["_json"]
        return text

    @property
    def exact_limit(self) -> int:
        """`exact_below` as a number: 4096 where "auto" was not resolved for a device."""
        return 4096 if self.exact_below == "auto" else self.exact_below
