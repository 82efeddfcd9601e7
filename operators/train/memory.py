"""Estimates the memory of a training worker: weights, gradients and optimizer by ZeRO stage, and activations.

Not included are logits, of at most 1 GiB. Source of the first part: ZeRO (arXiv:1910.02054), section 3, but with
gradients accumulated in fp32. What a layer keeps for its backward pass was counted on transformers' Llama.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from operators.train.config import TrainConfig
from operators.train.lora import ALL_LINEAR, LoraConfig
from operators.train.quantise import BYTES_PER_WEIGHT

_FP32 = 4
_MOMENTS = 2 * _FP32  # Adam's two moments
_KEPT_HIDDEN = {"fp32": 10, "bf16": 12}  # tensors of the hidden size that a layer keeps for its backward pass
_KEPT_INNER = 4  # and of the size of its MLP
_MOST_HEADER = 100 << 20  # bytes; the limit of the safetensors format
_IN_A_LAYER = re.compile(r"\.\d+\.")


@dataclass(frozen=True)
class StudentSize:
    """Numbers of weights; 0 if unknown.

    Attributes:
        parameters: weights of the student.
        adapters: weights of low-rank adapters, if only these are trained; 0 if all weights are.
        linear: weights of the layers' matrices, which `train.quantize` changes.
    """

    parameters: int = 0
    adapters: int = 0
    linear: int = 0


def measure(student: str, lora: LoraConfig) -> StudentSize:
    """Read the sizes from the headers of a folder's safetensors; all 0 for a model that is not in a folder."""
    shapes: dict[str, list[int]] = {}
    for file in Path(student).glob("*.safetensors"):
        shapes |= _shapes(file)
    linear = sum(math.prod(shape) for name, shape in shapes.items() if _is_linear(name, shape))
    return StudentSize(sum(map(math.prod, shapes.values())), count_adapters(shapes, lora), linear)


def count_adapters(shapes: Mapping[str, list[int]], lora: LoraConfig) -> int:
    """Number of weights of all adapters: rank x (outputs + inputs) for each linear layer that gets one."""
    return sum(lora.r * sum(shape) for name, shape in shapes.items() if _is_adapted(name, shape, lora))


def bytes_per_worker(size: StudentSize, config: TrainConfig) -> int:
    """Bytes that one worker holds during training, without those that are offloaded from a GPU.

    If the training is elastic, those of its smallest group.

    Args:
        size: of the student; if it has adapters, only they have gradients and optimizer state.
        config: workers, ZeRO stage, precision and quantisation.
    """
    on_device, on_host = _bytes(size, config)
    return on_device if config.gpus_per_worker else on_device + on_host


def host_bytes_per_worker(size: StudentSize, config: TrainConfig) -> int:
    """Bytes that one worker on a GPU holds in the memory of the host, because they are offloaded."""
    return _bytes(size, config)[1] if config.gpus_per_worker else 0


def _bytes(size: StudentSize, config: TrainConfig) -> tuple[int, int]:
    """Bytes of a worker on its device, and offloaded ones on the host."""
    stage, workers = config.sharding, config.min_workers or config.num_workers
    half = config.precision == "bf16"
    weights, gradients = 2 if half else _FP32, _FP32 + (2 if half else 0)  # bf16 gradients are added to fp32 ones
    master = _FP32 if half or stage else 0  # ZeRO updates a flat fp32 copy of its part
    trained, held = size.adapters or size.parameters, size.parameters + size.adapters
    of_gradients = trained * gradients if stage < 2 else -(-trained * gradients // workers)
    of_optimizer = -(-trained * (master + _MOMENTS) // workers) if stage else trained * (master + _MOMENTS)
    quantised = size.linear if config.quantize == "4bit" else 0
    of_weights = (held - quantised) * weights + math.ceil(quantised * BYTES_PER_WEIGHT)
    of_weights = -(-of_weights // workers) if stage == 3 else of_weights
    match config.offload:
        case "none":
            return of_weights + of_gradients + of_optimizer, 0
        case "optimizer":  # with the gradients of its part
            return of_weights, of_gradients + of_optimizer
        case "optimizer_and_weights":
            return 0, of_weights + of_gradients + of_optimizer


def activation_bytes(student: str, config: TrainConfig, tokens: int) -> int:
    """Bytes of activations that one worker keeps for the backward pass, roughly; 0 for a model not in a folder.

    Args:
        student: a folder with config.json.
        config: precision, recomputation, packs of a pass and workers that share them.
        tokens: of a pack.
    """
    file = Path(student) / "config.json"
    settings = json.loads(file.read_text()) if file.is_file() else {}
    settings = settings.get("text_config", settings)
    names = ("num_hidden_layers", "hidden_size", "intermediate_size")
    layers, hidden, inner = (int(settings.get(name) or 0) for name in names)
    one = _KEPT_HIDDEN[config.precision] * hidden + _KEPT_INNER * inner
    kept = layers * hidden + one if config.activation_checkpointing else layers * one
    slice_tokens = -(-tokens * config.packs_per_pass // config.sequence_parallel)
    return slice_tokens * kept * (2 if config.precision == "bf16" else _FP32)


def saves_checkpoints(config: TrainConfig) -> bool:
    """Whether a training of at least two of its steps saves a checkpoint before its end."""
    every = config.checkpoint_every_steps
    counted = every > 0 and not 0 < config.max_steps <= every
    return counted or config.checkpoint_every_minutes > 0


def copied_bytes(size: StudentSize, config: TrainConfig) -> int:
    """Bytes of host memory, over all workers, for the copies from which checkpoints are written in the background."""
    saves = saves_checkpoints(config) or config.evaluate_every_steps > 0
    if not (saves and config.checkpoint_in_background):
        return 0
    half, stage = config.precision == "bf16", config.sharding
    weights = 0 if stage == 3 else 2 if half else _FP32  # one worker writes them
    return (size.adapters or size.parameters) * (weights + (_FP32 if half or stage else 0) + _MOMENTS)


def _is_adapted(name: str, shape: list[int], lora: LoraConfig) -> bool:
    module = name.removesuffix(".weight")
    if module == name or len(shape) != 2 or not lora.r:
        return False
    if isinstance(lora.target_modules, list):
        return any(module == wanted or module.endswith(f".{wanted}") for wanted in lora.target_modules)
    if lora.target_modules != ALL_LINEAR:
        return re.fullmatch(lora.target_modules, module) is not None
    return _is_linear(name, shape)


def _is_linear(name: str, shape: list[int]) -> bool:
    """Whether a tensor is the matrix of a linear layer; embeddings and the head are not inside a layer."""
    return name.endswith(".weight") and len(shape) == 2 and _IN_A_LAYER.search(name) is not None


def _shapes(file: Path) -> dict[str, list[int]]:
    """Names and shapes of a file's tensors; empty if the file is damaged, which another check reports."""
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            head = json.loads(stream.read(min(length, _MOST_HEADER)))
    except (ValueError, OSError):
        return {}
    return {name: entry["shape"] for name, entry in head.items() if name != "__metadata__"}
