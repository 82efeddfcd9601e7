"""The plan of mode "causal_local": nothing in it depends on the content of later tokens.

A document is cut into segments of L tokens, and into steps of whole segments. Query i, in the step that begins at token
e, reads, in one softmax:

1. window: tokens e - W .. i exactly, where W is `window` rounded up to whole segments;
2. sinks: the first `num_sinks` tokens, exactly, where they lie before the window;
3. look-back: the segments before the window whose mean keys have its largest logits, exactly;
4. pooled: each other segment before the window as one key, its mean key and mean value with the weight log(count).
   The mean of the first segment leaves out the sinks.

Each key counts once. (With the choice "lsh", the keys that the look-back finds stay in their means too.)

All parts but the look-back are ranges of positions, which the rows of one step share.

Shape letters: B batch, Hk key heads, T queries, S keys, P pooled segments, L tokens of a segment, D head size.
"""

from dataclasses import replace

import torch
from torch import Tensor

from kernels.hyper_attention.config import HyperAttentionConfig
from kernels.hyper_attention.documents import Documents
from kernels.hyper_attention.plan.choose_segments import choose_segments, num_chosen, read_chosen
from kernels.hyper_attention.plan.lsh_lookback import build_lookback
from kernels.hyper_attention.plan.segments import numbered
from kernels.hyper_attention.plan.tables import KeyPlan, Lookback, Pooled, band

_STEP = 256


def build_local_plan(
    q: Tensor, k: Tensor, documents: Documents, config: HyperAttentionConfig, chosen: Tensor | None = None
) -> KeyPlan:
    """KeyPlan of mode "causal_local"; documents of at most `exact_below` keys are all window.

    Args:
        q: [B, Hq, T, D]; query t stands at key position t + S - T.
        k: [B, Hk, S, D].
        documents: of the key positions; more than one only if S == T.
        config: sizes and seed.
        chosen: what `choose_segments` found for these queries and keys; None: it is called here.
    """
    queries, S = q.shape[2], k.shape[2]
    segment = config.segment or 1
    step = segment * max(1, _STEP // segment)
    window = -(-config.window // segment) * segment
    position = torch.arange(S, device=documents.start.device)[S - queries :]
    begin, padding = documents.start[:, S - queries :], documents.padding()[:, S - queries :]
    local = position - begin
    older = (local // step * step - window).clamp(min=0)
    older = torch.where(documents.lengths()[:, S - queries :] <= config.exact_limit, 0, older)
    window_band = band(begin + older, torch.where(padding, position, position + 1), S)
    sinks = band(begin, begin + older.clamp(max=config.num_sinks), S) if config.num_sinks else None
    reaches = config.lookback > 0 and window < S
    hashed = reaches and (config.choice == "lsh" or not config.segment)
    lookbacks: tuple[Lookback, ...] = (build_lookback(q, k, documents, older, config),) if hashed else ()
    if not config.segment or config.segment > S:
        return KeyPlan(window_band, (), sinks, None, lookbacks)
    segments = _Segments(documents, config)
    first = segments.first[:, S - queries :]
    pooled = Pooled(
        band(first, first + older // segment, segments.start.shape[1]),
        segments.start.to(torch.int32),
        segments.skip.to(torch.int32),
        config.segment,
    )
    hidden = None
    if reaches and not hashed:
        hidden = choose_segments(q, k, pooled, num_chosen(config)) if chosen is None else chosen
        pooled, lookbacks = replace(pooled, hidden=hidden), read_chosen(hidden, pooled, k)
    return KeyPlan(window_band, (), sinks, pooled, lookbacks, chosen=hidden)


class _Segments:
    """Whole segments of all documents, numbered along the row; int64.

    `start` [B, P] is the first token of each, 0 if unused; `skip` [B, P] how many of its first tokens are sinks;
    `first` [B, S] the number of the first segment of each token's document.
    """

    def __init__(self, documents: Documents, config: HyperAttentionConfig) -> None:
        S, L = documents.start.shape[1], config.segment
        position = torch.arange(S, device=documents.start.device)
        local = position - documents.start
        whole = (local % L == L - 1) & ~documents.padding()
        count, last = numbered(whole, S // L)
        before = torch.nn.functional.pad(count + 1, (1, 0))
        self.first = before.gather(1, documents.start)
        self.start = torch.where(last < S, last - (L - 1), 0)
        document_start = documents.start.gather(1, self.start)
        self.skip = (config.num_sinks - (self.start - document_start)).clamp(min=0)
