"""Writes docs/configuration.md and configs/schema.json from the configuration models: `make docs`.

    python -m flows.configuration_page [--check]

`--check` writes nothing, and exits with 1 if a file does not match the code.
"""

import argparse
import inspect
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from pydantic.fields import FieldInfo

from cluster.runtime import REPOSITORY
from flows.config import RunConfig
from operators.stage import StageConfig

PAGE, SCHEMA = Path("docs/configuration.md"), Path("configs/schema.json")
# The last word of a key gives its unit.
UNITS = {
    "s": "seconds",
    "seconds": "seconds",
    "gib": "GiB",
    "mib": "MiB",
    "bytes": "bytes",
    "tokens": "tokens",
    "len": "tokens",
    "chars": "characters",
    "rows": "rows",
    "steps": "steps",
    "minutes": "minutes",
    "fraction": "fraction",
    "share": "fraction",
    "price": "currency per million tokens",
    "cost": "currency",
}
TYPES = {"string": "text", "boolean": "true or false", "null": "null"}
LIMITS = {
    "minimum": "at least",
    "exclusiveMinimum": "above",
    "maximum": "at most",
    "exclusiveMaximum": "below",
    "minLength": "length at least",
}
HEAD = """# Configuration

Written by `make docs` from the code; do not edit. A run reads one YAML file. Any key can also be set on the command
line, such as `train.max_steps=20`. An editor that reads [configs/schema.json](../configs/schema.json) completes and
checks the keys.

A key marked *operational* says where or how fast a stage runs: finished work stays valid when it changes. When any
other key changes, the next run makes the assets that depend on it again.
"""


@dataclass(frozen=True)
class Key:
    """One key of the configuration, as the page shows it."""

    name: str  # below its section
    type: str
    default: str
    unit: str
    operational: bool
    text: str


def sections() -> Iterator[tuple[str, type[StageConfig]]]:
    """Sections of the configuration with their models, in the order of the file; the top level comes first, as ""."""
    yield "", RunConfig
    for name, field in RunConfig.model_fields.items():
        model = model_of(field)
        if model is not None:
            yield name, model


def keys_of(model: type[StageConfig], prefix: str = "") -> Iterator[Key]:
    """Keys of one section; a model inside it adds its keys with a dotted prefix. The top level leaves sections out."""
    schema = model.model_json_schema()
    for name, field in model.model_fields.items():
        inner = model_of(field)
        if inner is not None and model is RunConfig:
            continue
        if inner is not None:
            yield from keys_of(inner, f"{prefix}{name}.")
            continue
        default = "required" if field.is_required() else f"`{_json(field.get_default(call_default_factory=True))}`"
        kind = type_text(schema["properties"][name], schema.get("$defs", {}))
        operational = name in model.operational()
        yield Key(prefix + name, kind, default, UNITS.get(name.split("_")[-1], ""), operational, text_of(field))


def model_of(field: FieldInfo) -> type[StageConfig] | None:
    """The model in a field's type, which may be optional; None if there is none."""
    kinds = (field.annotation, *get_args(field.annotation))
    return next((kind for kind in kinds if inspect.isclass(kind) and issubclass(kind, StageConfig)), None)


def text_of(field: FieldInfo) -> str:
    """The field's description on one line; empty if it has none."""
    return " ".join((field.description or "").split())


def type_text(schema: dict[str, Any], definitions: dict[str, Any]) -> str:
    """A JSON schema in words: `integer, at least 1`."""
    if "$ref" in schema:
        return type_text(definitions[schema["$ref"].rpartition("/")[2]], definitions)
    if "anyOf" in schema:
        return " or ".join(type_text(one, definitions) for one in schema["anyOf"])
    if "enum" in schema:
        return f"one of {', '.join(map(json.dumps, schema['enum']))}"
    if "const" in schema:
        return json.dumps(schema["const"])
    if "prefixItems" in schema:
        return f"[{', '.join(type_text(one, definitions) for one in schema['prefixItems'])}]"
    if schema.get("type") == "array":
        return f"list of {type_text(schema.get('items', {}), definitions)}"
    if schema.get("type") == "object":
        values = schema.get("additionalProperties")
        return f"keys with {type_text(values, definitions)}" if isinstance(values, dict) else "keys and values"
    kind = schema.get("type", "any")
    return ", ".join([TYPES.get(kind, kind), *_limits(schema)])


def _limits(schema: dict[str, Any]) -> list[str]:
    pattern = [f"matching `{schema['pattern']}`"] if "pattern" in schema else []
    return [*(f"{word} {schema[name]}" for name, word in LIMITS.items() if name in schema), *pattern]


def page() -> str:
    """docs/configuration.md."""
    parts = [HEAD]
    for section, model in sections():
        title = f"`{section}`" if section else "Top level"
        about = inspect.cleandoc(model.__doc__ or "").split("\n\n")[0].replace("\n", " ")
        rows = [
            f"| `{key.name}` | {_cell(key.type)} | {_cell(key.default)} "
            f"| {key.unit} | {'yes' if key.operational else ''} | {_cell(key.text)} |"
            for key in keys_of(model)
        ]
        head = "| key | type | default | unit | operational | meaning |\n|---|---|---|---|---|---|"
        parts.append(f"## {title}\n\n{about}\n\n{head}\n" + "\n".join(rows) + "\n")
    return "\n".join(parts)


def schema() -> str:
    """configs/schema.json, with which editors check a YAML file."""
    found = RunConfig.model_json_schema()
    found |= {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "recycle-and-train"}
    for definition in (found, *found.get("$defs", {}).values()):
        for properties in definition.get("properties", {}).values():
            properties.pop("title", None)
    return json.dumps(found, indent=1, sort_keys=True) + "\n"


def main(argv: Sequence[str]) -> int:
    """Write both files, or with --check compare them; 1 if one is out of date."""
    parser = argparse.ArgumentParser(prog="python -m flows.configuration_page", description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a file is out of date")
    check = parser.parse_args(argv).check
    stale = {path: text for path, text in ((PAGE, page()), (SCHEMA, schema())) if not _is_current(path, text)}
    for path, text in stale.items():
        if not check:
            (REPOSITORY / path).write_text(text, encoding="utf-8")
        sys.stdout.write(f"{path}: {'is out of date; run `make docs`' if check else 'written'}\n")
    return int(check and bool(stale))


def _is_current(path: Path, text: str) -> bool:
    file = REPOSITORY / path
    return file.is_file() and file.read_text(encoding="utf-8") == text


def _json(value: Any) -> str:
    return json.dumps(value.model_dump(mode="json") if isinstance(value, StageConfig) else value)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
