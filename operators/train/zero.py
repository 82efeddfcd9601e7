"""DeepSpeed's settings of ZeRO: what is sharded over the workers, and what is kept in the memory of the host.

Source: ZeRO-Offload (arXiv:2101.06840). The step of an offloaded optimizer runs on the CPU, by torch's fused AdamW:
DeepSpeed's own is a C++ extension that is compiled when it is first used.
"""

from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:  # imported only where a model is trained
    from operators.train.config import TrainConfig

Offload = Literal["none", "optimizer", "optimizer_and_weights"]
# Gradients exchanged at once, in elements: the fewest, those per worker, and the most, on GPUs and on CPUs.
_BUCKET, _BUCKET_ON_CPUS = (50_000_000, 6_250_000, 200_000_000), (10_000_000, 2_500_000, 50_000_000)


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


def bucket_elements(on_gpu: bool, workers: int, weights: int = 0) -> int:
    """The number of gradients that are exchanged at once.

    In a ring each worker sends its share of a bucket at a time, so with more workers a bucket must grow, or the shares
    become so small that latency counts. It need not be larger than the model.

    Args:
        on_gpu: whether the workers have GPUs.
        workers: number of them.
        weights: that are trained; 0 if unknown.
    """
    fewest, per_worker, most = _BUCKET if on_gpu else _BUCKET_ON_CPUS
    wanted = min(max(fewest, workers * per_worker), most)
    return min(wanted, weights) if weights else wanted


def zero_settings(config: "TrainConfig", workers: int = 0, weights: int = 0) -> dict[str, Any]:
    """The section `zero_optimization` of DeepSpeed's configuration.

    Args:
        config: of the training.
        workers: that there are, which may be fewer than configured; 0 for the configured number.
        weights: that are trained; 0 if unknown.
    """
    on_gpu = config.gpus_per_worker > 0
    bucket = bucket_elements(on_gpu, workers or config.num_workers, weights)
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
    if on_gpu and (workers or config.num_workers) > 1 and settings["stage"] in (1, 2):
        # Gradients are exchanged beside the backward pass, for one more bucket; DeepSpeed's default only in stage 3.
        settings["overlap_comm"] = True
    host = {"device": "cpu", "pin_memory": on_gpu}  # pinned memory is copied to a GPU while that computes
    if config.offload != "none":
        settings["offload_optimizer"] = host
    if config.offload == "optimizer_and_weights":
        settings["offload_param"] = host
    return settings
