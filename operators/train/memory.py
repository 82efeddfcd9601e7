"""How much memory a training worker needs for weights, gradients and optimizer, by ZeRO stage.

Activations come on top: with recomputation about 2 bytes x layers x hidden size x tokens of a pack, and at most 1 GiB
of logits. Source: ZeRO (arXiv:1910.02054), section 3, with the fp32 gradients that this project accumulates in.
"""

from operators.train.config import TrainConfig

_FP32 = 4
_MOMENTS = 2 * _FP32  # of Adam


def bytes_per_worker(parameters: int, config: TrainConfig) -> int:
    """Bytes that one worker holds while training.

    Args:
        parameters: of the student.
        config: workers, ZeRO stage and precision.
    """
    stage, workers = config.sharding, config.num_workers
    half = config.precision == "bf16"
    weights, gradients = 2 if half else _FP32, _FP32 + (2 if half else 0)  # bf16 gradients become fp32 as they come
    master = _FP32 if half or stage else 0  # ZeRO steps on a flat copy of its part
    whole = (0 if stage == 3 else weights) + (0 if stage >= 2 else gradients) + (0 if stage else master + _MOMENTS)
    shared = (weights if stage == 3 else 0) + (gradients if stage >= 2 else 0) + (master + _MOMENTS if stage else 0)
    return parameters * whole + -(-parameters * shared // workers)
