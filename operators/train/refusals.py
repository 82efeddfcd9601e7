"""Combinations of keys that no training can do. Does not import torch."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # it imports this module
    from operators.train.config import TrainConfig


def impossible(config: "TrainConfig") -> str:
    """The first reason why training cannot run as configured, with keys, values and cure; "" if it can."""
    return _compiled_shards(config) or (_shared_packs(config) if config.sequence_parallel > 1 else "")


def _compiled_shards(config: "TrainConfig") -> str:
    if not config.compile or config.zero_stage != 3:
        return ""
    return (
        "compile: true with zero_stage: 3, whose weights come and go inside a layer; use zero_stage 2 or less, "
        "or compile: false"
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
