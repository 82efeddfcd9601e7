"""Writes a model into safetensors files tensor by tensor, so that nobody has to hold a file, let alone the model.

The library's own writer takes all tensors of a file at once. The format is: the length of the header in 8 bytes, the
header in JSON, the bytes of the tensors. Source: https://huggingface.co/docs/safetensors, "Format".
"""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from operators.train.checkpoint import write_json

PATTERN = "model{suffix}.safetensors"
_ALIGNED = 8  # bytes; tensors begin at multiples of the size of their numbers
_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class ShardWriter:
    """The files of one model in a folder."""

    def __init__(self, folder: Path, planned: Mapping[str, Tensor], limit: int | str) -> None:
        """Make the files, with their headers and sizes, in place of those of an earlier attempt.

        Args:
            folder: it must exist.
            planned: tensors of any device, also meta, with name, shape and dtype of each weight.
            limit: bytes of a file, as a number or such as "5GB"; a larger tensor has a file to itself.

        Raises:
            ValueError: a tensor has a dtype that the format does not know.
        """
        self._folder, self._planned = folder, dict(planned)
        empty = {name: torch.empty_like(tensor, device="meta") for name, tensor in planned.items()}
        self._split = split_torch_state_dict_into_shards(empty, filename_pattern=PATTERN, max_shard_size=limit)
        self._places: dict[str, tuple[Path, int]] = {}
        for old in folder.glob("model*.safetensors*"):
            old.unlink()
        for file, names in self._split.filename_to_tensors.items():
            self._begin(folder / file, names)
        self._missing = set(planned)

    def write(self, name: str, tensor: Tensor) -> None:
        """Write one tensor of the plan, in any order.

        Raises:
            ValueError: it is not in the plan, or it has another shape or dtype there.
        """
        planned = self._planned.get(name)
        if planned is None or (planned.shape, planned.dtype) != (tensor.shape, tensor.dtype):
            wanted = "nothing" if planned is None else f"{planned.dtype} {tuple(planned.shape)}"
            raise ValueError(f"train: weight {name} is {tensor.dtype} {tuple(tensor.shape)}, planned was {wanted}")
        file, begin = self._places[name]
        numbers = tensor.detach().cpu().contiguous().reshape(-1)
        with file.open("r+b") as stream:
            stream.seek(begin)
            stream.write(numbers.view(torch.uint8).numpy().data)
        self._missing.discard(name)

    def finish(self) -> None:
        """Write the index, if there are several files.

        Raises:
            ValueError: a weight of the plan was not written.
        """
        if self._missing:
            raise ValueError(f"train: {len(self._missing)} weights were not written, such as {min(self._missing)}")
        if self._split.is_sharded:
            numbers = sum(tensor.numel() for tensor in self._planned.values())
            metadata = {"total_parameters": numbers, **self._split.metadata}
            index = {"metadata": metadata, "weight_map": self._split.tensor_to_filename}
            write_json(self._folder / SAFE_WEIGHTS_INDEX_NAME, index)

    def _begin(self, file: Path, names: list[str]) -> None:
        """Write the header of a file, and make the file as long as it will be."""
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        end = 0
        # Larger numbers come first, so that every tensor is aligned.
        for name in sorted(names, key=lambda name: -self._planned[name].dtype.itemsize):
            tensor = self._planned[name]
            if tensor.dtype not in _NAMES:
                raise ValueError(f"train: weight {name} is {tensor.dtype}, which safetensors cannot hold here")
            begin, end = end, end + tensor.numel() * tensor.dtype.itemsize
            header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
            self._places[name] = file, begin
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % _ALIGNED)
        first = 8 + len(text)
        self._places |= {name: (file, first + self._places[name][1]) for name in names}
        with file.open("wb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            stream.truncate(first + end)
