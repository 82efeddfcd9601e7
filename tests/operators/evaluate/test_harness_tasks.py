"""Which code the tasks of a folder may run. That tasks are loaded is shown in test_harness.py."""

from pathlib import Path

import pytest

from operators.evaluate.harness_tasks import outside_code
from tests.operators.evaluate.task_folder import write_tasks


def test_functions_and_includes_inside_the_folder_are_allowed(tmp_path: Path) -> None:
    assert outside_code(Path(write_tasks(tmp_path / "tasks"))) == []


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("task: x\nprocess_docs: !function os.system\n", "names the function os.system"),
        ("task: x\nmetric_list: [{metric: !function ../elsewhere.f}]\n", "names the function ../elsewhere.f"),
        ("task: x\nclass: !function answers.missing.Task\n", "names the function answers.missing.Task"),
        ("task: x\ninclude: ../other.yaml\n", "other.yaml is outside the folder"),
        ("task: x\ninclude: [linked.yaml]\n", "other.yaml is outside the folder"),
        ("task: !!python/object/apply:os.system [ls]\n", "cannot be read"),
    ],
)
def test_code_from_elsewhere_is_named(tmp_path: Path, text: str, told: str) -> None:
    folder = Path(write_tasks(tmp_path / "tasks"))
    (tmp_path / "elsewhere.py").write_text("def f(): pass\n")
    (tmp_path / "other.yaml").write_text("task: other\n")
    (folder / "linked.yaml").symlink_to(tmp_path / "other.yaml")
    (folder / "x.yaml").write_text(text)
    assert any(told in problem for problem in outside_code(folder))


def test_files_that_include_each_other_are_read_once(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("include: b.yaml\n")
    (tmp_path / "b.yaml").write_text("include: a.yaml\n")
    assert outside_code(tmp_path) == []
