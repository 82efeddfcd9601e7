"""Optimizers by name: AdamW and Muon are created by DeepSpeed, Adafactor and 8-bit AdamW here, and it wraps them."""

import importlib.util
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:  # imported only where a model is trained
    from operators.train.config import TrainConfig

OptimizerName = Literal["adamw", "adamw_8bit", "adafactor", "muon"]
# DeepSpeed converts only AdamW's moments for another number of workers.
NOT_RESIZED = ("adamw_8bit", "muon")
_BETAS, _EPSILON, _MOMENTUM = (0.9, 0.999), 1e-8, 0.95


def refusal(config: "TrainConfig") -> str:
    """The reason why this optimizer cannot be used with this configuration; "" if it can."""
    if config.optimizer == "adafactor" and config.sharding:
        return (
            f"optimizer: adafactor with zero_stage: {config.zero_stage} and precision: {config.precision}; ZeRO's "
            "shards have no rows and columns that it could factor; set zero_stage: 0 and precision: fp32"
        )
    if config.optimizer == "muon" and config.zero_stage == 3:
        return "optimizer: muon with zero_stage: 3, for which nothing was measured; set zero_stage: 2 or less"
    if config.optimizer == "muon" and config.lora.r:
        return "optimizer: muon with lora, whose matrices have the rank of the adapter; set optimizer: adamw"
    return ""


def missing_package(config: "TrainConfig") -> str:
    """An error about a package that must be installed first; "" if there is none."""
    if config.optimizer == "adamw_8bit" and importlib.util.find_spec("bitsandbytes") is None:
        return "train.optimizer: adamw_8bit needs bitsandbytes, which is not installed; `pip install bitsandbytes`"
    return ""


def deepspeed_settings(config: "TrainConfig") -> dict[str, Any]:
    """The part of DeepSpeed's configuration for the optimizer and the gradient that it gets."""
    adam = {"lr": config.learning_rate, "weight_decay": config.weight_decay, "betas": list(_BETAS), "eps": _EPSILON}
    adam["torch_adam"] = True  # DeepSpeed's own Adam is a C++ extension that is compiled on first use
    clipping = {"gradient_clipping": config.max_grad_norm}
    match config.optimizer:
        case "adamw":  # in one pass over the parameters, without copies of their size
            return clipping | {"optimizer": {"type": "AdamW", "params": {**adam, "fused": True}}}
        case "muon":
            # ZeRO would clip not the gradient but the update that was made of it, to a fraction of what it should be.
            unclipped = {"gradient_clipping": 0.0}
            return unclipped | {"optimizer": {"type": "Muon", "params": {**adam, "momentum": _MOMENTUM}}}
    return clipping | {"zero_allow_untested_optimizer": True}


def own_optimizer(parameters: Iterable[Any], config: "TrainConfig") -> Any:
    """The optimizer to pass to DeepSpeed; None if it creates its own.

    Raises:
        ValueError: a package is missing.
    """
    if missing := missing_package(config):
        raise ValueError(missing)
    match config.optimizer:
        case "adafactor":
            from transformers.optimization import Adafactor

            return Adafactor(
                parameters,
                lr=config.learning_rate,
                weight_decay=config.weight_decay,
                scale_parameter=False,
                relative_step=False,
                warmup_init=False,
            )
        case "adamw_8bit":
            from bitsandbytes.optim import AdamW8bit

            return AdamW8bit(
                parameters, lr=config.learning_rate, betas=_BETAS, eps=_EPSILON, weight_decay=config.weight_decay
            )
    return None


def set_rate(groups: Iterable[dict[str, Any]], rate: float, config: "TrainConfig") -> None:
    """Set the learning rate of this step in each group of parameters."""
    for group in groups:
        group["lr"] = rate * config.muon_rate_factor if group.get("use_muon") else rate
