"""The allowed configurations of the reflections; a template is identified by its text."""

from pathlib import Path

import pytest

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


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"template": "/no/such/file.j2"}, "file.j2 does not exist"),
        ({"template": "{{ texts }}"}, "reply_form"),
        ({"criteria": {"Bad Name": "x"}}, "small letters"),
        ({"criteria": {"better_response": "x"}}, "none of"),
        ({"criteria": {"tone": " "}}, "needs a question"),
        ({"criteria": {f"c{number}": "x" for number in range(21)}}, "more than 20"),
    ],
)
def test_settings_that_cannot_work_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PromptConfig(**values)  # type: ignore[arg-type]
