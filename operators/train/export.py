"""Exports the finished student as an ordinary Hugging Face folder: weights, tokenizer, template, generation config.

Weights are gathered and written one at a time, so that no worker holds more of the model than it does in training.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers.core_model_loading import revert_weight_conversion
from transformers.pytorch_utils import Conv1D

from operators.student.encode import load_tokenizer
from operators.student.generation import exportable
from operators.train.checkpoint import patient_group
from operators.train.lora import ADAPTER_FOLDER, LoraConfig, adapted_layers, base_of, merged, own_parameters, plain_name
from operators.train.quantise import is_quantised, plain_model
from operators.train.shards import ShardWriter

MAX_SHARD_SIZE = "5GB"


class ExportError(RuntimeError):
    """The trained student could not be written; the training itself is kept."""


@dataclass(frozen=True)
class _Weight:
    """A weight of the student: its name there, its parameter (under ZeRO-3 a part) or buffer, its adapted layer."""

    name: str
    stored: Tensor
    layer: Any = None

    @property
    def empty(self) -> Tensor:
        """A tensor of its whole shape on the meta device."""
        shape = getattr(self.stored, "ds_shape", self.stored.shape)
        return torch.empty(shape, dtype=self.stored.dtype, device="meta")

    @contextmanager
    def gathered(self) -> Iterator[Tensor]:
        """The whole weight, on rank 0 with its adapter merged; every worker must call this."""
        import deepspeed

        parts = [self.stored, *(own_parameters(self.layer) if self.layer else [])]
        with deepspeed.zero.GatheredParameters(parts, enabled=hasattr(self.stored, "ds_id")):
            first = dist.get_rank() == 0
            yield merged(self.stored, self.layer) if self.layer and first else self.stored.detach()


def export_student(
    engine: Any, student: str, folder: Path, lora: LoraConfig | None = None, chat_template: str = ""
) -> str:
    """Write the trained model; every worker must call this, and all raise an error if rank 0 cannot write.

    After a quantised training (QLoRA) rank 0 needs host memory for the whole model before quantisation.

    Args:
        engine: the DeepSpeed engine.
        student: where tokenizer and chat template come from.
        folder: gets safetensors of at most 5 GB, config, generation config (stopping at the learnt end of turn),
            tokenizer and chat template.
        lora: if it has a rank, the adapters are merged into the weights (those before quantisation) and also written by
            themselves, or only the adapters are written.
        chat_template: text that replaces the student's own template; "" keeps it.

    Returns:
        What was changed in the generation config so that it can be saved; "" if nothing, and on other ranks.

    Raises:
        ExportError: the folder cannot be written.
    """
    lora, base = lora or LoraConfig(), base_of(engine.module)
    adapters = gathered_adapters(engine.module) if lora.r else {}
    whole, quantised = lora.merge or not lora.r, any(map(is_quantised, base.parameters()))
    problems, changed = list[str](), ""
    with patient_group() as group:
        if dist.get_rank() == 0:
            with _noted(problems):
                if lora.r:
                    place = folder / ADAPTER_FOLDER if lora.merge else folder
                    engine.module.save_pretrained(place, state_dict=adapters, save_embedding_layers=False)
                base = _unquantised(engine.module, student) if whole and quantised else base
                changed = _write_settings(base, load_tokenizer(student, chat_template), folder, whole=whole)
                if whole and quantised:
                    base.save_pretrained(folder, max_shard_size=MAX_SHARD_SIZE)
        if whole and not quantised:
            stream_weights(engine.module, folder, problems)
        told = [problems]
        dist.broadcast_object_list(told, src=0, group=group)
    if told[0]:
        raise ExportError(f"train: the trained student cannot be written to {folder}: {told[0][0]}")
    return changed


def stream_weights(module: torch.nn.Module, folder: Path, problems: list[str]) -> None:
    """Gather one weight after the other, and let rank 0 write it; every worker must call this.

    Some models hold several weights of their files as one, such as those of all experts. Then a layer is held at a
    time.

    Args:
        module: the student, perhaps with adapters, which are merged.
        folder: for the files.
        problems: gets the reason why rank 0 cannot write. If there is one, it writes nothing, but takes part.
    """
    base = base_of(module)
    writer: ShardWriter | None = None
    groups, planned = _planned(base, _weights_of(module))
    with _noted(problems):
        if dist.get_rank() == 0 and not problems:
            writer = ShardWriter(folder, planned, MAX_SHARD_SIZE)
    for group in groups:
        held: dict[str, Tensor] = {}
        for weight in group:
            with weight.gathered() as whole, _noted(problems):
                if writer is None or problems:
                    continue
                held[weight.name] = whole.to("cpu", copy=len(group) > 1)
                for name, tensor in (_in_files(base, held) if len(held) == len(group) else {}).items():
                    writer.write(name, tensor)
    with _noted(problems):
        if writer is not None and not problems:
            writer.finish()


def gathered_weights(module: torch.nn.Module) -> dict[str, Tensor]:
    """All weights on the host of rank 0, with merged adapters; tied weights appear once. On other ranks {}."""
    weights: dict[str, Tensor] = {}
    for weight in _weights_of(module):
        with weight.gathered() as whole:
            if dist.get_rank() == 0:
                weights[weight.name] = whole.to("cpu", copy=True)
    return weights


def _weights_of(module: torch.nn.Module) -> list[_Weight]:
    """Parameters, tied ones once, and then the buffers that belong into files."""
    base = base_of(module)
    layers = adapted_layers(module) if base is not module else {}
    found = [
        _Weight(plain_name(name), parameter, layers.get(name.removesuffix(".base_layer.weight")))
        for name, parameter in base.named_parameters()
    ]
    parameters = {plain_name(name) for name, _ in base.named_parameters(remove_duplicate=False)}
    state = {plain_name(name): value for name, value in base.state_dict().items()}
    buffers = [_Weight(name, value) for name, value in state.items() if name not in parameters]
    return [weight for weight in [*found, *buffers] if weight.name]


def _planned(base: Any, weights: list[_Weight]) -> tuple[list[list[_Weight]], dict[str, Tensor]]:
    """The smallest groups of weights that can be converted apart, and what the files will hold, on the meta device."""
    empty = {weight.name: weight.empty for weight in weights}
    whole = _in_files(base, empty)
    ways: list[Callable[[str], str]] = [lambda name: name, _layer_of, lambda _: ""]
    for group_of in ways:
        groups: dict[str, list[_Weight]] = {}
        for weight in weights:
            groups.setdefault(group_of(weight.name), []).append(weight)
        planned: dict[str, Tensor] = {}
        for group in groups.values():
            with suppress(Exception):  # a conversion that misses a weight
                planned |= _in_files(base, {weight.name: empty[weight.name] for weight in group})
        if _shapes(planned) == _shapes(whole):
            break
    return list(groups.values()), planned


def _in_files(base: Any, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights under the names and in the shapes that the model's files have."""
    ignored = set(base._keys_to_ignore_on_save or ())
    kept = {name: tensor for name, tensor in weights.items() if name not in ignored}
    return dict(revert_weight_conversion(base, kept)) if kept else {}


def _layer_of(name: str) -> str:
    """The part of a name up to the number of a layer; all of it outside of the layers."""
    parts = name.split(".")
    place = next((number for number, part in enumerate(parts) if part.isdigit()), len(parts))
    return ".".join(parts[: place + 1])


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}


@contextmanager
def _noted(problems: list[str]) -> Iterator[None]:
    """Note an error and go on: the other workers wait for rank 0, and all raise it at the end."""
    try:
        yield
    except Exception as error:  # noqa: BLE001
        problems.append(f"{type(error).__name__}: {' '.join(str(error).split())}")


def _unquantised(module: torch.nn.Module, student: str) -> Any:
    """The student as it was before quantisation, with merged adapters."""
    plain = plain_model(student, base_of(module).dtype)
    for name, layer in adapted_layers(module).items():
        found = plain.get_submodule(name)
        weight = found.weight.data
        # bitsandbytes stores the weights of GPT-2's layers as those of linear ones.
        found.weight.data = merged(weight.T, layer).T.contiguous() if type(found) is Conv1D else merged(weight, layer)
    return plain


def gathered_adapters(module: torch.nn.Module) -> dict[str, Tensor]:
    """The adapters' weights on the host of rank 0, by their names in the wrapper; on other ranks {}."""
    import deepspeed

    adapters: dict[str, Tensor] = {}
    for name, parameter in module.named_parameters():
        if not plain_name(name):
            with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
                if dist.get_rank() == 0:
                    adapters[name] = parameter.detach().to("cpu", copy=True)
    return adapters


def _write_settings(model: Any, tokenizer: Any, folder: Path, *, whole: bool) -> str:
    """Write all but weights. A folder of adapters gets no config.json, so that transformers loads their base model."""
    folder.mkdir(parents=True, exist_ok=True)
    model.generation_config, changed = exportable(model.generation_config, tokenizer)
    if whole:
        model.config.dtype = str(model.dtype).removeprefix("torch.")
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return changed
