"""Exports the finished student as an ordinary Hugging Face folder: weights, tokenizer, template, generation config."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers.pytorch_utils import Conv1D

from operators.student.encode import load_tokenizer
from operators.student.generation import exportable
from operators.train.lora import ADAPTER_FOLDER, LoraConfig, adapted_layers, base_of, merged, own_parameters, plain_name
from operators.train.quantise import is_quantised, plain_model

MAX_SHARD_SIZE = "5GB"


class ExportError(RuntimeError):
    """The trained student could not be written; the training itself is kept."""


def export_student(engine: Any, student: str, folder: Path, lora: LoraConfig | None = None) -> str:
    """Write the trained model; every worker must call this, and all raise an error if rank 0 cannot write.

    Under ZeRO-3 one tensor at a time is gathered; rank 0 needs host memory for one whole copy of the model.

    Args:
        engine: the DeepSpeed engine.
        student: where tokenizer and chat template come from.
        folder: gets safetensors of at most 5 GB, config, generation config (stopping at the learnt end of turn),
            tokenizer and chat template.
        lora: if it has a rank, the adapters are merged into the weights (those before quantisation) and also written by
            themselves, or only the adapters are written.

    Returns:
        What was changed in the generation config so that it can be saved; "" if nothing, and on other ranks.

    Raises:
        ExportError: the folder cannot be written.
    """
    lora, base = lora or LoraConfig(), base_of(engine.module)
    adapters = gathered_adapters(engine.module) if lora.r else {}
    quantised = any(map(is_quantised, base.parameters()))
    whole = (lora.merge or not lora.r) and not quantised
    weights = gathered_weights(engine.module) if whole else {}
    problem, changed = [""], ""
    if dist.get_rank() == 0:
        try:
            if lora.r:
                place = folder / ADAPTER_FOLDER if lora.merge else folder
                engine.module.save_pretrained(place, state_dict=adapters, save_embedding_layers=False)
            if quantised:
                base, weights = _unquantised(engine.module, student, merge=lora.merge)
            changed = _write(base, weights, student, folder)
        except Exception as error:  # noqa: BLE001 - sent to all workers, who would wait for this one
            problem[0] = f"{type(error).__name__}: {' '.join(str(error).split())}"
    dist.broadcast_object_list(problem, src=0)
    if problem[0]:
        raise ExportError(f"train: the trained student cannot be written to {folder}: {problem[0]}")
    return changed


def gathered_weights(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """All weights on the host of rank 0, with merged adapters; tied weights appear once. On other ranks {}."""
    import deepspeed

    base, first = base_of(module), dist.get_rank() == 0
    layers = adapted_layers(module) if base is not module else {}
    weights: dict[str, torch.Tensor] = {}
    for name, parameter in base.named_parameters():
        plain, layer = plain_name(name), layers.get(name.removesuffix(".base_layer.weight"))
        if not plain:
            continue
        parts = [parameter, *(own_parameters(layer) if layer else [])]
        with deepspeed.zero.GatheredParameters(parts, enabled=hasattr(parameter, "ds_id")):
            if first:
                whole = merged(parameter, layer) if layer else parameter.detach()
                weights[plain] = whole.to("cpu", copy=True)
    if first:
        parameters = {plain_name(name) for name, _ in base.named_parameters(remove_duplicate=False)}
        state = {plain_name(name): value for name, value in base.state_dict().items()}
        weights |= {name: buffer.cpu() for name, buffer in state.items() if name and name not in parameters}
    return weights


def _unquantised(module: torch.nn.Module, student: str, *, merge: bool) -> tuple[Any, dict[str, torch.Tensor]]:
    """The student as it was before quantisation, and its weights with merged adapters; {} without `merge`."""
    plain = plain_model(student, base_of(module).dtype)
    if not merge:
        return plain, {}
    for name, layer in adapted_layers(module).items():
        found = plain.get_submodule(name)
        weight = found.weight.data
        # bitsandbytes stores the weights of GPT-2's layers as those of linear ones.
        found.weight.data = merged(weight.T, layer).T.contiguous() if type(found) is Conv1D else merged(weight, layer)
    return plain, plain.state_dict()


def gathered_adapters(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The adapters' weights on the host of rank 0, by their names in the wrapper; on other ranks {}."""
    import deepspeed

    adapters: dict[str, torch.Tensor] = {}
    for name, parameter in module.named_parameters():
        if not plain_name(name):
            with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
                if dist.get_rank() == 0:
                    adapters[name] = parameter.detach().to("cpu", copy=True)
    return adapters


def _write(model: Any, weights: dict[str, torch.Tensor], student: str, folder: Path) -> str:
    """Write the model, or only the files that belong to adapters, which are already in the folder.

    A folder of adapters gets no config.json, so that transformers loads their base model.
    """
    tokenizer = load_tokenizer(student)
    model.generation_config, changed = exportable(model.generation_config, tokenizer)
    if weights:
        model.save_pretrained(folder, state_dict=weights, max_shard_size=MAX_SHARD_SIZE)
    else:
        model.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return changed
