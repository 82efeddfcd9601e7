"""Configuration of the reflections: what the teacher is asked, and the form of its replies."""

from typing import Literal

from pydantic import Field

from operators.own_prompt import SHIPPED, PromptConfig
from operators.reflect.prompts import ReplyFormat, Style
from operators.stage import StageConfig


class ReflectConfig(StageConfig):
    """Configuration of both reflections, the section `reflect`."""

    style: Style = Field(
        "concise",
        description="What the teacher is asked to write: `papers` asks for more complex instructions and answers as "
        "detailed as possible, as the papers do; `concise` asks for clear instructions and answers to the point.",
    )
    instructions: PromptConfig = SHIPPED
    responses: PromptConfig = SHIPPED
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
