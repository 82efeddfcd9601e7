"""Where the document of each token begins and ends.

Shape letters: B batch, T queries, S keys, N documents.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

PADDING = -1


@dataclass(frozen=True)
class Documents:
    """Document of each key position; both tensors are int64 [B, S].

    Attributes:
        start: first position of the token's document; a padding token's own position.
        stop: one past the last position; a padding token's own position, so that its document is empty.
        single: true if the caller gave no documents: each row is one, without padding. Read without asking the device.
    """

    start: Tensor
    stop: Tensor
    single: bool

    def lengths(self) -> Tensor:
        """Length of the document of each token, int64 [B, S]; 0 for padding."""
        return self.stop - self.start

    def padding(self) -> Tensor:
        """True where a token belongs to no document, [B, S]."""
        return self.stop == self.start


def whole(batch: int, keys: int, device: torch.device) -> Documents:
    """Each row is one document."""
    start = torch.zeros(batch, keys, dtype=torch.int64, device=device)
    return Documents(start, start + keys, single=True)


def of_ids(document_ids_BS: Tensor) -> Documents:
    """Documents from one number for each token, which must not decrease; -1 marks padding, and ends a document."""
    ids = document_ids_BS.to(torch.int64)
    position = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    first = torch.ones_like(ids, dtype=torch.bool)
    first[:, 1:] = ids[:, 1:] != ids[:, :-1]
    start = torch.where(first, position, 0).cummax(1).values
    next_start = torch.full_like(ids, ids.shape[1])
    next_start[:, :-1] = torch.where(first, position, ids.shape[1])[:, 1:]
    stop = next_start.flip(1).cummin(1).values.flip(1)
    padding = ids == PADDING
    return Documents(torch.where(padding, position, start), torch.where(padding, position, stop), single=False)


def ids_of_cu_seqlens(cu_seqlens_N: Tensor, tokens: int) -> Tensor:
    """Document of each token of one packed row, int64 [1, T]; offsets are 0, l_1, l_1 + l_2, ...; -1 after the last."""
    position = torch.arange(tokens, device=cu_seqlens_N.device)
    ids = torch.searchsorted(cu_seqlens_N.to(torch.int64), position, right=True) - 1
    return torch.where(position < cu_seqlens_N[-1], ids, PADDING)[None]
