"""Low-rank adapters by PEFT: the student's weights stay unchanged, two small matrices per layer are trained.

Source: LoRA (arXiv:2106.09685), section 4.1: W' = W + alpha / r * B A, with B zero at the start.
"""

from typing import TYPE_CHECKING, Any, Self

from pydantic import Field, model_validator

from operators.stage import StageConfig

if TYPE_CHECKING:  # takes seconds to import
    import torch

ALL_LINEAR = "all-linear"
ADAPTER_FOLDER = "adapter"  # inside the student's folder, next to the merged weights
_NAME = "default"  # PEFT's name of the one adapter


class LoraConfig(StageConfig):
    """Adapters instead of all weights. A learning rate of 1e-4 to 2e-4 is usual, ten times that of all weights."""

    r: int = Field(default=0, ge=0, description="Rank of the adapters; 0 trains all weights and no adapter.")
    alpha: float = Field(default=0, ge=0, description="Adapters are scaled by `alpha / r`; 0 means twice the rank.")
    dropout: float = Field(default=0, ge=0, lt=1, description="Dropout on the input of an adapter during training.")
    target_modules: str | list[str] = Field(
        default=ALL_LINEAR,
        description="Layers with an adapter: names such as q_proj, a regular expression for whole names, or "
        "all-linear: every linear layer but the output head.",
    )
    merge: bool = Field(
        default=True,
        description="Export the student with merged adapters, and the adapters in a folder of their own; false exports "
        "only the adapters, which need the base model wherever they are loaded.",
    )

    @model_validator(mode="after")
    def _other_keys_need_a_rank(self) -> Self:
        fields = type(self).model_fields
        unused = [name for name, field in fields.items() if getattr(self, name) != field.default]
        if not self.r and unused:
            raise ValueError(f"lora: {', '.join(unused)} have no effect with r: 0; set lora.r, or leave them out")
        return self

    @property
    def scaled_by(self) -> float:
        """Alpha for PEFT: the configured one, or twice the rank."""
        return self.alpha or 2.0 * self.r


def with_adapters(model: Any, config: LoraConfig, seed: int) -> Any:
    """Wrap the model so that only adapters are trained; returns the model unchanged if there are none.

    Args:
        model: the student, after all other changes to its layers.
        config: rank, scale and layers.
        seed: of the adapters' first values, so that they are the same on every worker and after a restart.

    Raises:
        ValueError: no layer has such a name, or the output head or the embedding would get an adapter.
    """
    if not config.r:
        return model
    import torch
    from peft import LoraConfig as PeftConfig
    from peft import get_peft_model

    settings = PeftConfig(
        task_type="CAUSAL_LM",
        r=config.r,
        lora_alpha=config.scaled_by,  # type: ignore[arg-type]  # PEFT divides it by r, whatever number it is
        lora_dropout=config.dropout,
        target_modules=config.target_modules,
    )
    ends = {id(model.get_input_embeddings()): "the embedding", id(model.get_output_embeddings()): "the output head"}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            # Adapters have the model's dtype, because ZeRO-3 requires it; the optimizer has an fp32 copy in any case.
            wrapped = get_peft_model(model, settings, autocast_adapter_dtype=False)
        except ValueError as error:
            raise ValueError(f"train: train.lora.target_modules: {' '.join(str(error).split())}") from None
    touched = [ends[id(layer.base_layer)] for layer in adapted_layers(wrapped).values() if id(layer.base_layer) in ends]
    if touched:
        raise ValueError(
            f"train: train.lora.target_modules: {config.target_modules} gives {touched[0]} an adapter; noise and loss "
            "work there; name other layers, or all-linear"
        )
    return wrapped


def adapted_layers(model: Any) -> dict[str, Any]:
    """Name in the model without adapters -> layer with an adapter."""
    from peft.tuners.lora import LoraLayer

    base = base_of(model)
    return {name: layer for name, layer in base.named_modules() if isinstance(layer, LoraLayer)}


def base_of(model: Any) -> Any:
    """The student inside the wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def plain_name(name: str) -> str:
    """The name of a weight in the student itself, without the wrapper's parts; "" for a weight of an adapter."""
    return "" if ".lora_" in name else name.replace(".base_layer.", ".")


def own_parameters(layer: Any) -> "list[torch.nn.Parameter]":
    """The two matrices of a layer's adapter."""
    return [layer.lora_A[_NAME].weight, layer.lora_B[_NAME].weight]


def merged(weight: "torch.Tensor", layer: Any) -> "torch.Tensor":
    """A layer's weight with its adapter, added in fp32 and rounded once; both must be gathered."""
    a, b = (part.detach().float() for part in own_parameters(layer))
    change = layer.scaling[_NAME] * (b @ a)
    change = change.T if getattr(layer, "fan_in_fan_out", False) else change
    whole: torch.Tensor = (weight.detach().float() + change.to(weight.device)).to(weight.dtype)
    return whole
