"""The finished student as an ordinary Hugging Face folder: weights, tokenizer, template, and where it stops."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from operators.student.encode import load_tokenizer
from operators.student.generation import exportable

MAX_SHARD_SIZE = "5GB"


class ExportError(RuntimeError):
    """The trained student could not be written; the training itself is kept."""


def export_student(engine: Any, student: str, folder: Path) -> str:
    """Write the trained model; every worker must call it, and every worker raises if rank 0 cannot write.

    Under ZeRO-3 one tensor at a time is gathered; rank 0 needs host memory for one whole copy of the model.

    Args:
        engine: the DeepSpeed engine.
        student: where tokenizer and chat template come from.
        folder: gets safetensors of at most 5 GB, config, generation config (stopping at the learnt end of turn),
            tokenizer and chat template.

    Returns:
        What had to change in the generation config so that it can be saved; "" if nothing, and on other ranks.

    Raises:
        ExportError: the folder cannot be written.
    """
    weights = gathered_weights(engine.module)
    problem, changed = [""], ""
    if dist.get_rank() == 0:
        try:
            changed = _write(engine.module, weights, student, folder)
        except Exception as error:  # noqa: BLE001 - told to all workers, who would wait for this one
            problem[0] = f"{type(error).__name__}: {' '.join(str(error).split())}"
    dist.broadcast_object_list(problem, src=0)
    if problem[0]:
        raise ExportError(f"train: the trained student cannot be written to {folder}: {problem[0]}")
    return changed


def gathered_weights(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """All weights on the host of rank 0, an empty dict elsewhere; tied weights appear once."""
    import deepspeed

    first = dist.get_rank() == 0
    weights: dict[str, torch.Tensor] = {}
    for name, parameter in module.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            if first:
                weights[name] = parameter.detach().to("cpu", copy=True)
    if first:
        parameters = {name for name, _ in module.named_parameters(remove_duplicate=False)}
        state = module.state_dict()
        weights |= {name: buffer.cpu() for name, buffer in state.items() if name not in parameters}
    return weights


def _write(module: Any, weights: dict[str, torch.Tensor], student: str, folder: Path) -> str:
    tokenizer = load_tokenizer(student)
    module.generation_config, changed = exportable(module.generation_config, tokenizer)
    module.save_pretrained(folder, state_dict=weights, max_shard_size=MAX_SHARD_SIZE)
    tokenizer.save_pretrained(folder)
    return changed
