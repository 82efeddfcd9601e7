"""Compares two states of training bit by bit."""

from typing import Any

import torch


def differences(one: Any, other: Any, place: str = "") -> list[str]:
    """Where two states differ in a bit, a shape or a type."""
    if isinstance(one, torch.Tensor):
        same = one.dtype == other.dtype and torch.equal(one, other)
        return [] if same else [place]
    if isinstance(one, dict):
        found = [] if one.keys() == other.keys() else [place]
        return found + [at for key in one for at in differences(one[key], other.get(key), f"{place}/{key}")]
    if isinstance(one, list | tuple):
        found = [] if len(one) == len(other) else [place]
        return found + [
            at for n, pair in enumerate(zip(one, other, strict=False)) for at in differences(*pair, f"{place}/{n}")
        ]
    if hasattr(one, "__dict__") and not isinstance(one, type):
        return [] if type(one) is type(other) else [place]
    return [] if one == other else [place]
