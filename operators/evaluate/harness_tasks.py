"""The tasks of lm-evaluation-harness that a configuration names: which code they may run, and whether they load.

    python -m operators.evaluate.harness_tasks '<HarnessConfig as JSON>'     prints what is wrong with each task as JSON

A task is a YAML file whose templates and `!function` tags are code. So tasks come only from the installed package and
from the configured folder, and their functions from the same two places.
"""

import importlib.util
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from operators.evaluate.config import HarnessConfig

OFFLINE = {"HF_DATASETS_OFFLINE": "1"}  # read when `datasets` is imported
PACKAGE = "lm_eval"


class _Function(str):
    """A `!function` tag of a task, as it is written."""

    __slots__ = ()


class _Loader(yaml.SafeLoader):
    """Reads a task without running anything."""


def _function(loader: yaml.SafeLoader, node: yaml.Node) -> _Function:
    return _Function(node.value if isinstance(node, yaml.ScalarNode) else "")


_Loader.add_constructor("!function", _function)


def package_folder() -> Path | None:
    """The folder of the installed harness; None if it is not installed."""
    found = importlib.util.find_spec(PACKAGE)
    return Path(found.origin).parent if found is not None and found.origin else None


def outside_code(folder: Path) -> list[str]:
    """The functions and included files of the tasks of a folder that are neither in it nor in the package.

    Args:
        folder: with task files, at any depth.
    """
    allowed = [path.resolve() for path in (folder, package_folder()) if path is not None]
    files = sorted(file for file in folder.rglob("*.yaml") if "__pycache__" not in file.parts)
    return [text for file in files for text in _outside(file.resolve(), allowed, set())]


def _outside(file: Path, allowed: list[Path], seen: set[Path]) -> Iterator[str]:
    if file in seen:
        return
    seen.add(file)
    if not any(file.is_relative_to(root) for root in allowed):
        yield f"{file} is outside the folder"
        return
    try:
        task = _Loader(file.read_bytes()).get_single_data()
    except (OSError, yaml.YAMLError) as error:
        yield f"{file} cannot be read: {' '.join(str(error).split())[:200]}"
        return
    for name in _functions(task):
        module = (file.parent / f"{name.rpartition('.')[0].replace('.', '/')}.py").resolve()
        if not module.is_file() or not any(module.is_relative_to(root) for root in allowed):
            yield f"{file.name} names the function {name}, whose file is not in the folder"
    included = task.get("include", []) if isinstance(task, dict) else []
    for name in included if isinstance(included, list) else [included]:
        yield from _outside((file.parent / str(name)).resolve(), allowed, seen)


def _functions(value: Any) -> Iterator[_Function]:
    if isinstance(value, _Function):
        yield value
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _functions(inner)


def open_tasks(config: HarnessConfig) -> Any:
    """The harness's manager of the package's tasks and those of the folder, which take precedence.

    It changes the working directory to the folder, as data files in a task may be relative to it. No metric is loaded
    from the hub, because it would be code.

    Raises:
        ValueError: a task of the folder would run code from elsewhere.
    """
    sys.modules["evaluate"] = None  # type: ignore[assignment]  # its `load` downloads and runs metrics
    from lm_eval.tasks import TaskManager

    if not config.include_path:
        return TaskManager()
    if outside := outside_code(Path(config.include_path)):
        raise ValueError("; ".join(outside[:3]))
    os.chdir(config.include_path)
    own = TaskManager(include_path=config.include_path, include_defaults=False)
    # To index the package's tasks takes many seconds.
    return own if set(config.tasks) <= set(own.all_tasks) else TaskManager(include_path=config.include_path)


def problems(config: HarnessConfig) -> dict[str, str]:
    """Task or folder -> why it cannot be used; loads each task with its data, and runs its code."""
    try:
        manager = open_tasks(config)
    except (ValueError, OSError) as error:
        return {config.include_path: str(error)}
    found = {name: _problem(manager, name) for name in config.tasks}
    return {name: problem for name, problem in found.items() if problem}


def _problem(manager: Any, name: str) -> str:
    if name not in manager.all_tasks:
        return "no such task, group or tag"
    try:
        tasks = manager.load([name])["tasks"]
    except Exception as error:  # noqa: BLE001 - a task's code may raise anything
        return f"cannot be loaded: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
    for each in tasks.values():
        if getattr(each, "UNSAFE_CODE", False):
            return "runs code that the model wrote, which is never done here"
        if getattr(each, "MULTIMODAL", False):
            return "shows the model pictures or sound"
        scored = each.config.process_results is None
        lacking = [metric for metric, function in each._metric_fn_list.items() if scored and function is None]
        if lacking:
            return f"needs the metric {lacking[0]}, which is not part of {PACKAGE}"
    return ""


if __name__ == "__main__":
    found = problems(HarnessConfig.model_validate_json(sys.argv[1]))
    sys.stdout.write(f"\n{json.dumps(found)}\n")
