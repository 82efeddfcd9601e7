"""The allowed configurations of the reflections; a template is identified by its text."""

from pathlib import Path

from operators.own_prompt import PromptConfig
from operators.reflect.config import ReflectConfig


def test_a_template_is_known_by_its_text_and_not_by_its_path(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).write_text("{{ texts }}{{ reply_form }}")
    one, two = (ReflectConfig(responses=PromptConfig(template=str(tmp_path / name))) for name in ("one", "two"))
    assert one.identity() == two.identity()
    (tmp_path / "two").write_text("Now:{{ texts }}{{ reply_form }}")
    changed = ReflectConfig(responses=PromptConfig(template=str(tmp_path / "two")))
    assert changed.identity() != one.identity()
    assert ReflectConfig.model_validate(changed.model_dump()) == changed, "what was read is not read again"
