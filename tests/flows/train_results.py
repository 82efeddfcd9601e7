"""The result of a training that did not take place."""

from typing import Any

from operators.train.result import TrainResult

NUMBERS = ("packs", "tokens", "supervised_tokens", "examples", "hyper_attention_layers", "zero_stage", "num_workers")
RATES = ("seconds", "wall_seconds", "tokens_per_second", "first_loss", "last_loss", "neft_l2", "neftune_alpha")
TEXTS = ("folder", "student", "identity", "attention", "attention_implementation", "precision", "backend")
LISTS: dict[str, Any] = {"losses": [], "grad_norms": [], "peak_rss_bytes": [], "notes": []}


def a_result(config: dict[str, Any], **known: Any) -> TrainResult:
    """A result with the configuration of the training and some known fields."""
    others = dict.fromkeys(NUMBERS, 1) | dict.fromkeys(RATES, 1.0) | dict.fromkeys(TEXTS, "") | LISTS
    return TrainResult.model_validate({**others, "packs_digest": "", "steps": 1, **known, "config": config})
