"""How the learning rate falls after the warm-up."""

import math
from typing import Literal

Schedule = Literal["cosine", "linear", "constant", "wsd"]
_WSD_DECAY = 0.2  # share of the steps after the warm-up in which a warm-up-stable-decay schedule falls to zero


def remaining(schedule: Schedule, progress: float) -> float:
    """The share of the learning rate that is left after `progress` of the steps after the warm-up, both from 0 to 1."""
    match schedule:
        case "cosine":
            return 0.5 * (1 + math.cos(math.pi * progress))
        case "linear":
            return 1 - progress
        case "wsd":
            return min(1.0, (1 - progress) / _WSD_DECAY)
        case "constant":
            return 1.0
