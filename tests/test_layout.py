"""The shape of the repository: small files, the agreed top level, and no clash with Hugging Face's `kernels`."""

import importlib.util
import os
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGES = ("flows", "operators", "kernels", "cluster")
MODULES = sorted(file for package in PACKAGES for file in (REPOSITORY / package).rglob("*.py"))
MOST_LINES = 300
TOP_LEVEL = {
    "pyproject.toml", "flows", "operators", "kernels", "cluster", "tests", "configs",
    "README.md", "Makefile", ".ci", "docs", "benchmarks", "LICENSE", ".gitignore",
}  # fmt: skip


@pytest.mark.parametrize("module", MODULES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_a_module_is_small_and_says_what_it_is_for(module: Path) -> None:
    text = module.read_text()
    assert len(text.splitlines()) <= MOST_LINES
    if module.name != "__init__.py":
        assert text.startswith(('"""', "#!/usr/bin/env python\n"))


def test_the_top_level_is_the_agreed_one() -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    if tracked.returncode:
        pytest.skip("not a git checkout")
    assert {name.split("/")[0] for name in tracked.stdout.splitlines()} <= TOP_LEVEL


def test_our_kernels_do_not_pass_for_hugging_faces() -> None:
    assert (REPOSITORY / "kernels" / "__init__.py").read_text() == ""
    assert not list((REPOSITORY / "tests").rglob("__init__.py"))
    assert importlib.util.find_spec("kernels").origin == str(REPOSITORY / "kernels" / "__init__.py")  # type: ignore[union-attr]
    from transformers import LlamaForCausalLM

    assert LlamaForCausalLM.__name__ == "LlamaForCausalLM"


def test_the_flow_is_executable() -> None:
    flow = REPOSITORY / "flows" / "recycle_and_train.py"
    assert os.access(flow, os.X_OK)
    assert flow.read_text().startswith("#!/usr/bin/env python\n")
