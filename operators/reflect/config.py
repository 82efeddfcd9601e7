"""Configuration of the reflections: what the teacher is asked, and the form of its replies."""

import re
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator

from operators.reflect.prompts import ReplyFormat, Style, render_frame
from operators.stage import StageConfig

MOST_CRITERIA = 20
CRITERION = r"[a-z][a-z0-9]*(_[a-z0-9]+)*"
RESERVED = ("better_instruction", "better_response")


class PromptConfig(StageConfig):
    """Replacements for parts of the shipped prompt of one of the two reflections."""

    criteria: dict[str, str] = Field(
        {},
        description="Criteria of the critique, instead of the papers': names such as `clarity`, each with a question.",
    )
    template: str = Field(
        "",
        description="File with a jinja2 template of the prompt; it must write `texts` (the row's fenced texts) and "
        "`reply_form` once each, and may write `criteria` and `request`; empty takes the shipped prompt.",
    )
    system: str = Field("", description="System turn before the prompt; empty sends none.")

    @field_validator("criteria")
    @classmethod
    def _names(cls, criteria: dict[str, str]) -> dict[str, str]:
        if len(criteria) > MOST_CRITERIA:
            raise ValueError(f"{len(criteria)} criteria are more than {MOST_CRITERIA}; name fewer")
        for name, question in criteria.items():
            if not re.fullmatch(CRITERION, name) or name in RESERVED or not question.strip():
                raise ValueError(
                    f"criterion {name!r} needs a question, and a name of small letters, digits and underscores "
                    f"that is none of {', '.join(RESERVED)}"
                )
        return criteria

    @field_validator("template")
    @classmethod
    def _read(cls, template: str) -> str:
        """Replace the file's name by its text, so that a changed text makes finished reflections stale."""
        if not template or "{{" in template:
            text = template
        else:
            path = Path(template).expanduser()
            if not path.is_file():
                raise ValueError(f"{template} does not exist; give a jinja2 template")
            text = path.read_text(encoding="utf-8")
        if text:
            render_frame(text, {"criterion": "question"}, "request", "reply form")
        return text


class ReflectConfig(StageConfig):
    """Configuration of both reflections, the section `reflect`."""

    style: Style = Field(
        "concise",
        description="What the teacher is asked to write: `papers` asks for more complex instructions and answers as "
        "detailed as possible, as the papers do; `concise` asks for clear instructions and answers to the point.",
    )
    instructions: PromptConfig = PromptConfig()
    responses: PromptConfig = PromptConfig()
    form: ReplyFormat = Field(
        "json",
        description="Format of the replies: json is structured output, delimited is headings as in the papers.",
    )
    max_tokens: int = Field(1024, ge=16, description="Length of the longest reply, in tokens.")
    critique_chars: int = Field(
        400,
        ge=20,
        description="Longest part of the critique by one criterion that is kept, in characters; the ledger keeps all.",
    )
    text_chars: int = Field(
        8000, ge=20, description="Longest rewritten text, in characters; a reply with a longer one is refused."
    )
    repair: bool = Field(True, description="Give the teacher one more turn if its reply cannot be read.")
    repair_chars: int = Field(
        4000, ge=0, description="Longest part of an unreadable reply that is shown to the teacher again, in characters."
    )

    def prompts_of(self, part: Literal["instructions", "responses"]) -> PromptConfig:
        """The configuration of one of the two reflections."""
        return self.instructions if part == "instructions" else self.responses
