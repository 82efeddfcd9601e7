"""The configuration of the student: which model it is, and how its turns are written."""

import hashlib
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import Field

from operators.stage import Finding, StageConfig

TEMPLATE_KEY = "student.chat_template"


class StudentConfig(StageConfig):
    """The model that is trained; before training it also scores the teacher's rewrites."""

    model: str = Field(
        description="The model: a folder, a hub id, or `package:<wheel>` for a model inside an installed wheel."
    )
    chat_template: str = Field(
        "",
        description="Jinja file with the student's chat template, used instead of the model's own and exported with "
        "the student; empty takes the model's. Only its content counts, not its path.",
    )

    def identity(self) -> dict[str, Any]:
        """The model, and the hash of the template if one is set, so that older work stays valid."""
        found = {key: value for key, value in super().identity().items() if key != "chat_template"}
        if self.chat_template:
            found["chat_template"] = template_digest(self.template) or "missing"
        return found

    @cached_property
    def template(self) -> str:
        """The text of the template, read once; "" without one, or if its file cannot be read (see `findings`)."""
        try:
            return Path(self.chat_template).read_text(encoding="utf-8") if self.chat_template else ""
        except (OSError, UnicodeDecodeError):
            return ""

    def findings(self) -> list[Finding]:
        """Why the template's file cannot be used; `operators.student.doctor` checks what its text writes."""
        if not self.chat_template or self.template.strip():
            return []
        state = "is empty or no UTF-8 text" if Path(self.chat_template).is_file() else "does not exist or is no file"
        cure = "give a Jinja file, or leave out the key for the model's own template"
        return [Finding(TEMPLATE_KEY, f"{self.chat_template} {state}; {cure}")]


def template_digest(template: str) -> str:
    """What identifies a template; "" for the model's own."""
    return hashlib.sha256(template.encode()).hexdigest()[:16] if template else ""


def templated(revision: str, template: str) -> str:
    """The revision of a model that is used with a template; the model's own revision without one."""
    return f"{revision}+{template_digest(template)}" if template else revision
