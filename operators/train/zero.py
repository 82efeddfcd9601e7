"""DeepSpeed's settings of ZeRO: what is sharded over the workers, and what is kept in the memory of the host.

Source: ZeRO-Offload (arXiv:2101.06840). The step of an offloaded optimizer runs on the CPU, by torch's fused AdamW:
DeepSpeed's own is a C++ extension that is compiled when it is first used.
"""

from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:  # imported only where a model is trained
    from operators.train.config import TrainConfig

Offload = Literal["none", "optimizer", "optimizer_and_weights"]
_BUCKET_ELEMENTS, _BUCKET_ELEMENTS_ON_CPUS = 50_000_000, 10_000_000


def refusal(config: "TrainConfig") -> str:
    """The reason why nothing can be offloaded with this configuration; "" if it can."""
    if config.offload == "none":
        return ""
    if not config.sharding:
        return (
            f"offload: {config.offload} with zero_stage: 0 and precision: fp32, where DeepSpeed keeps nothing apart "
            "that it could offload; set zero_stage: 1 or more"
        )
    if config.offload == "optimizer_and_weights" and config.zero_stage != 3:
        return (
            f"offload: optimizer_and_weights with zero_stage: {config.zero_stage}, where every worker has all weights; "
            "set zero_stage: 3, or offload: optimizer"
        )
    if config.optimizer != "adamw":
        return (
            f"offload: {config.offload} with optimizer: {config.optimizer}, which does not run on a host beside a GPU; "
            "set optimizer: adamw"
        )
    return ""


def zero_settings(config: "TrainConfig") -> dict[str, Any]:
    """The section `zero_optimization` of DeepSpeed's configuration."""
    on_gpu = config.gpus_per_worker > 0
    bucket = _BUCKET_ELEMENTS if on_gpu else _BUCKET_ELEMENTS_ON_CPUS
    # One worker on CPUs has nothing to shard; stage 1, of the same checkpoints, copies gradients once a step only.
    alone = config.num_workers == 1 and config.sharding == 2 and not on_gpu
    settings: dict[str, Any] = {
        "stage": 1 if alone else config.sharding,
        # DeepSpeed reduces whole buckets either way; off, it does so in place and not in copies.
        "reduce_scatter": on_gpu,
        # DeepSpeed's default of 5e8 elements is a buffer of two gigabytes per worker, more than a small model.
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
    }
    host = {"device": "cpu", "pin_memory": on_gpu}  # pinned memory is copied to a GPU while that computes
    if config.offload != "none":
        settings["offload_optimizer"] = host
    if config.offload == "optimizer_and_weights":
        settings["offload_param"] = host
    return settings
