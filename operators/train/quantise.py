"""Adapters over weights of four bits (QLoRA): loads the frozen weights quantised, and exports without their error.

Source: QLoRA (arXiv:2305.14314), section 3: NF4 with double quantisation; weights are restored to the training's number
format where they are multiplied. The adapters are trained against the quantised weights and merged into the original
ones, so the exported student differs from the trained model by the error of quantisation.
"""

import importlib.util
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # imported only where a model is trained
    import torch

    from operators.train.config import TrainConfig

PACKAGE = "bitsandbytes"
# Bytes of a weight: 4 bits, a byte for each block of 64, and 4 bytes for 256 such blocks.
BYTES_PER_WEIGHT = 0.5 + 1 / 64 + 4 / (64 * 256)


def refusal(config: "TrainConfig") -> str:
    """The reason why the weights cannot be quantised with this configuration; "" if they can."""
    if config.quantize == "none":
        return ""
    if not config.lora.r:
        return "quantize: 4bit without adapters, and quantised weights cannot be trained; set lora.r, such as 16"
    if config.zero_stage == 3:
        return "quantize: 4bit with zero_stage: 3, which cannot shard quantised weights; set zero_stage: 2 or less"
    if config.compile:
        return "quantize: 4bit with compile: true, for which nothing was measured; set compile: false"
    return ""


def missing_package(config: "TrainConfig") -> str:
    """An error about the package that must be installed first; "" if there is none."""
    if config.quantize == "none" or importlib.util.find_spec(PACKAGE) is not None:
        return ""
    return f"train.quantize: 4bit needs {PACKAGE}, which is not installed; `pip install {PACKAGE}`"


def loading_options(config: "TrainConfig", dtype: "torch.dtype") -> dict[str, Any]:
    """Further arguments of `from_pretrained`; none if nothing is quantised.

    Args:
        config: of the training.
        dtype: of the weights that stay as they are, and of every product.

    Raises:
        ValueError: the package is missing.
    """
    if config.quantize == "none":
        return {}
    if missing := missing_package(config):
        raise ValueError(missing)
    from transformers import BitsAndBytesConfig

    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    device = int(os.environ.get("LOCAL_RANK", "0")) if config.gpus_per_worker else "cpu"
    return {"quantization_config": settings, "device_map": {"": device}}


def plain_model(student: str, dtype: "torch.dtype") -> Any:
    """The student without quantisation, on the host, for the export."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(student, dtype=dtype, trust_remote_code=False, use_safetensors=True)


def is_quantised(parameter: Any) -> bool:
    """Whether a parameter holds packed weights of four bits."""
    return getattr(parameter, "quant_state", None) is not None


def num_weights(parameter: Any) -> int:
    """The number of weights that a parameter stands for: packed, sharded by ZeRO-3, or as they are."""
    if is_quantised(parameter):
        return int(parameter.quant_state.shape.numel())
    return int(getattr(parameter, "ds_numel", parameter.numel()))
