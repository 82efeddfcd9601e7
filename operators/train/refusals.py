"""Combinations of keys that no training can do. Does not import torch."""

from typing import TYPE_CHECKING

from operators.stage import Finding
from operators.train.optimizer import NOT_RESIZED

if TYPE_CHECKING:  # it imports this module
    from operators.train.config import TrainConfig


def impossible(config: "TrainConfig") -> str:
    """The first reason why training cannot run as configured, with keys, values and cure; "" if it can."""
    shared = _shared_packs(config) if config.sequence_parallel > 1 else ""
    return _without_effect(config) or _compiled_shards(config) or _elastic(config) or _parts_of_gpus(config) or shared


def unused(config: "TrainConfig") -> list[Finding]:
    """Warnings about keys that are given although another given key rules, as an override over a file does."""
    counted = "examples_per_step" if config.examples_per_step else "tokens_per_step"
    rulers = {
        "epochs": "max_steps" if config.max_steps else "",
        "packs_per_step": counted if getattr(config, counted) else "",
        "validation_share": "" if config.evaluate_every_steps else "evaluate_every_steps",
        "max_grad_norm": "optimizer" if config.optimizer == "muon" else "",
    }
    found = [
        Finding(
            f"train.{key}",
            f"{getattr(config, key)} is not used; train.{ruler}: {getattr(config, ruler)} rules",
            fatal=False,
        )
        for key, ruler in rulers.items()
        if ruler and key in config.model_fields_set
    ]
    return [*found, *_slow_step(config)]


def _slow_step(config: "TrainConfig") -> list[Finding]:
    """A warning about an optimizer on the host that has a single thread beside a GPU."""
    if config.offload == "none" or not config.gpus_per_worker:
        return []
    if (config.threads_per_worker or config.cpus_per_worker) > 1:
        return []
    given = f"cpus_per_worker: {config.cpus_per_worker:g} and threads_per_worker: {config.threads_per_worker}"
    text = (
        f"{config.offload} with {given}, so one thread of the host does each step; set cpus_per_worker to the CPUs of"
    )
    return [Finding("train.offload", f"{text} a node by its GPUs, such as 16", fatal=False)]


def _without_effect(config: "TrainConfig") -> str:
    """A key that has another value than its default and no effect, because the key that it belongs to is off."""
    exact = config.attention != "hyper_attention"
    needed = {
        "hyper_attention": "attention: hyper_attention" if exact else "",
        "hyper_attention_layers": "attention: hyper_attention" if exact else "",
        "neftune_noise": "" if config.neftune_alpha else "neftune_alpha above 0",
        "muon_rate_factor": "" if config.optimizer == "muon" else "optimizer: muon",
    }
    for key, need in needed.items():
        given, default = getattr(config, key), type(config).model_fields[key].default
        if need and given != default:
            return f"{key}: {given} has no effect without {need}; set that, or leave it out by train.{key}={default}"
    return ""


def _compiled_shards(config: "TrainConfig") -> str:
    if not config.compile or config.zero_stage != 3:
        return ""
    return (
        "compile: true with zero_stage: 3, whose weights come and go inside a layer; use zero_stage 2 or less, "
        "or compile: false"
    )


def _elastic(config: "TrainConfig") -> str:
    """Why no checkpoint can be continued with fewer workers."""
    if not 0 < config.min_workers < config.num_workers or config.optimizer not in NOT_RESIZED or not config.sharding:
        return ""
    return (
        f"min_workers: {config.min_workers} with optimizer: {config.optimizer}, whose checkpoints can be continued "
        "only with the same number of workers; set optimizer: adamw, or min_workers: 0"
    )


def _parts_of_gpus(config: "TrainConfig") -> str:
    if config.num_workers == 1 or config.gpus_per_worker in (0, 1):
        return ""
    return (
        f"gpus_per_worker: {config.gpus_per_worker} with num_workers: {config.num_workers}, but NCCL needs a GPU for "
        "each worker; set gpus_per_worker: 1, or num_workers: 1"
    )


def _shared_packs(config: "TrainConfig") -> str:
    """Why no pack can be shared by `sequence_parallel` workers."""
    given = f"sequence_parallel: {config.sequence_parallel}"
    if config.num_workers % config.sequence_parallel:
        return f"{given} does not divide num_workers: {config.num_workers}; choose a divisor, or other num_workers"
    if 0 < config.min_workers < config.num_workers:
        return (
            f"{given} with min_workers: {config.min_workers}, so that a number of workers may be left that it does not "
            "divide; set min_workers: 0"
        )
    if config.lora.dropout:
        return f"{given} with lora.dropout: {config.lora.dropout}, which each worker would draw anew; set it to 0"
    if config.attention == "hyper_attention" and _draws_by_head(config):
        return (
            f"{given} with hyper_attention: {config.hyper_attention}, whose draws depend on the number of a head; use "
            "mode causal_local with choice nominated or means and a segment, or sequence_parallel: 1"
        )
    return ""


def _draws_by_head(config: "TrainConfig") -> bool:
    """Whether HyperAttention hashes keys: a head has other projections if it is another one's neighbour."""
    sizes = config.hyper_attention_config()
    return sizes.mode == "paper" or (sizes.lookback > 0 and (sizes.choice == "lsh" or sizes.segment == 0))
