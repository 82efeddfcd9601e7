"""Whether a model's files can be loaded: complete weights in safetensors, and a tokenizer that fits the embeddings."""

import json
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from operators.stage import Finding

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

LINE_CHARS = 400
_SHARD = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.safetensors")


def one_line(error: BaseException) -> str:
    """The words of an error in one line."""
    return " ".join(str(error).split())[:LINE_CHARS]


def weight_findings(model: str, key: str, *, any_name: bool = False) -> Iterator[Finding]:
    """Whether the weights are safetensors and complete; a hub id is checked when it is downloaded.

    Args:
        model: folder or hub id.
        key: of the configuration, for the findings.
        any_name: safetensors of any name are loaded, as vLLM does; transformers loads `model.safetensors` or those that
            the index names.
    """
    folder = Path(model)
    if not folder.is_dir():
        return
    index = folder / "model.safetensors.index.json"
    try:
        wanted = sorted(set(json.loads(index.read_text())["weight_map"].values())) if index.is_file() else []
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        yield Finding(key, f"{index} cannot be read ({type(error).__name__}: {one_line(error)}); copy it again")
        return
    named = sorted(file.name for file in folder.glob("*.safetensors"))
    if not wanted:
        wanted = _with_their_shards(named) if any_name else [name for name in named if name == "model.safetensors"]
    missing = [name for name in wanted if name not in named]
    if missing:
        text = f"{folder} lacks {missing[0]} and {len(missing) - 1} more of {len(wanted)} weight files; copy it again"
        yield Finding(key, text)
    if not wanted:
        others = [file.name for file in folder.iterdir() if file.suffix in (".bin", ".pt", ".pth", ".ckpt")]
        has = f"only {', '.join(sorted(others))}" if others else f"only {named[0]}" if named else "no weights"
        why = "it has no index" if named and not others else "a pickle is never loaded"
        cure = "save it again with save_pretrained, which writes safetensors"
        yield Finding(key, f"{folder} has {has}, and {why}; {cure}")
    yield from (found for name in wanted if name not in missing for found in _readable(folder / name, key))


def embedding_findings(
    tokenizer: "PreTrainedTokenizerBase", config: "PretrainedConfig", needed: Collection[int], key: str
) -> Iterator[Finding]:
    """Tokens beyond the rows of the embeddings; control tokens that nothing writes are only a warning.

    Args:
        tokenizer: of the model.
        config: of the model.
        needed: the token ids of a rendered example.
        key: of the configuration, for the findings.
    """
    rows = config.get_text_config().vocab_size
    beyond = {token_id: token for token, token_id in tokenizer.get_vocab().items() if token_id >= rows}
    if not beyond:
        return
    added = tokenizer.added_tokens_decoder
    used = sorted(token for token_id, token in beyond.items() if token_id in needed or token_id not in added)
    shown = ", ".join(used[:3] or sorted(beyond.values())[:3])
    text = f"the tokenizer has {len(beyond)} tokens ({shown}) beyond the {rows} rows of the embeddings"
    if used:
        yield Finding(
            key, f"{text}, and they would be used; resize_token_embeddings and save it, or take its tokenizer"
        )
    else:
        yield Finding(
            key, f"{text}; only control tokens that the template does not write, so they are never used", False
        )


def _with_their_shards(names: list[str]) -> list[str]:
    """These files, and every other part of those that are named as one of several."""
    parts = [part for part in map(_SHARD.fullmatch, names) if part]
    shards = {f"{part[1]}-{at:05}-of-{part[3]}.safetensors" for part in parts for at in range(1, int(part[3]) + 1)}
    return sorted({*names, *shards})


def _readable(file: Path, key: str) -> Iterator[Finding]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="numpy"):
            pass
    except (SafetensorError, OSError) as error:
        yield Finding(key, f"{file} cannot be read ({one_line(error)}); copy it again")
