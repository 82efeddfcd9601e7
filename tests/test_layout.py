"""The layout of the repository: small files, tests that mirror the code, and no clash with Hugging Face's `kernels`."""

import ast
import importlib.util
import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGES = ("flows", "operators", "kernels", "cluster")
MODULES = sorted(file for package in PACKAGES for file in (REPOSITORY / package).rglob("*.py"))
MOST_LINES = 300
TOP_LEVEL = {
    "pyproject.toml", "flows", "operators", "kernels", "cluster", "tests", "configs", "README.md",
    "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "Makefile", ".ci", "docs", "benchmarks", "LICENSE", ".gitignore",
}  # fmt: skip
# Modules with logic, by file or folder, whose tests have another name. Most are parts of one computation, and only its
# final result can be compared with the reference.
TESTED_BY = {
    "kernels/hyper_attention/cpu/": "tests/kernels/hyper_attention/test_api.py",
    "kernels/hyper_attention/gpu/kept_sizes.py": "tests/kernels/hyper_attention/gpu/test_local.py",
    "kernels/hyper_attention/gpu/local/": "tests/kernels/hyper_attention/gpu/test_local.py",
    "kernels/hyper_attention/gpu/paper/": "tests/kernels/hyper_attention/gpu/test_paper.py",
}


@pytest.mark.parametrize("module", MODULES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_a_module_is_small_and_has_a_docstring(module: Path) -> None:
    text = module.read_text()
    assert len(text.splitlines()) <= MOST_LINES
    if module.name != "__init__.py":
        assert text.startswith(('"""', 'r"""', "#!/usr/bin/env python\n"))


def test_a_module_with_logic_has_a_test_file_of_its_name() -> None:
    with_logic = {str(module.relative_to(REPOSITORY)) for module in MODULES if _has_logic(module)}
    without = {name for name in with_logic if not (REPOSITORY / _test_of(name)).is_file()}
    missing = sorted(_test_of(name) for name in without if not name.startswith(tuple(TESTED_BY)))
    assert missing == [], f"write {', '.join(missing)}"
    assert {test for test in TESTED_BY.values() if not (REPOSITORY / test).exists()} == set()
    assert {part for part in TESTED_BY if not any(name.startswith(part) for name in without)} == set()


def test_the_top_level_has_the_agreed_entries() -> None:
    assert {name.split("/")[0] for name in _tracked()} <= TOP_LEVEL


def test_nothing_is_tracked_that_git_ignores() -> None:
    tracked = subprocess.run(
        ["git", "ls-files", "--cached", "--ignored", "--exclude-standard"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    )
    assert tracked.stdout == "", "a tracked link or folder of this name would replace the real one in every checkout"


def test_every_dependency_is_pinned_for_an_installation_on_cpus() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    wanted = [
        *project["dependencies"],
        *(need for extra in ("cpu", "dev") for need in project["optional-dependencies"][extra]),
    ]
    pinned = {line.partition("==")[0].lower() for line in (REPOSITORY / ".ci/constraints-cpu.txt").read_text().split()}
    names = {re.match(r"[\w.-]+", need).group().lower() for need in wanted}  # type: ignore[union-attr]
    assert names - pinned == set()


def test_our_kernels_are_not_mistaken_for_those_of_hugging_face() -> None:
    assert (REPOSITORY / "kernels" / "__init__.py").read_text() == ""
    assert not list((REPOSITORY / "tests").rglob("__init__.py"))
    assert importlib.util.find_spec("kernels").origin == str(REPOSITORY / "kernels" / "__init__.py")  # type: ignore[union-attr]
    from transformers import LlamaForCausalLM

    assert LlamaForCausalLM.__name__ == "LlamaForCausalLM"


def test_a_script_in_flows_does_not_shadow_a_library() -> None:
    """Python puts the folder of a script first on its path, so Ray once imported `flows/requests.py` as `requests`."""
    ours = {module.stem for module in (REPOSITORY / "flows").glob("*.py")} - {"__init__"}
    assert ours & (sys.stdlib_module_names | set(packages_distributions())) == set()


def test_the_flow_is_executable() -> None:
    flow = REPOSITORY / "flows" / "recycle_and_train.py"
    assert os.access(flow, os.X_OK)
    assert flow.read_text().startswith("#!/usr/bin/env python\n")


def _tracked() -> list[str]:
    tracked = subprocess.run(["git", "ls-files"], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    if tracked.returncode:
        pytest.skip("not a git checkout")
    return tracked.stdout.splitlines()


def _test_of(module: str) -> str:
    path = Path("tests") / module
    return str(path.with_name(f"test_{path.name}"))


def _has_logic(module: Path) -> bool:
    """Whether a function of the module does more than return one expression."""
    functions = [node for node in ast.walk(ast.parse(module.read_text())) if isinstance(node, ast.FunctionDef)]
    return any(len([line for line in function.body if not _is_text(line)]) > 1 for function in functions)


def _is_text(line: ast.stmt) -> bool:
    return isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant)
