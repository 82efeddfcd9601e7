"""How the student chooses: the section `select` of the configuration."""

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from operators.own_prompt import SHIPPED, PromptConfig
from operators.stage import StageConfig

Policy = Literal["none", "ifd", "ifd_rifd", "perplexity", "reward", "judge"]
Measure = Literal["ifd", "rifd", "perplexity", "reward", "judge"]
RATIOS: tuple[Measure, ...] = ("ifd", "rifd")
HIGHER_IS_BETTER: tuple[Measure, ...] = ("ifd", "reward", "judge")


class SelectConfig(StageConfig):
    """How the student chooses between a pair and its reflection."""

    policy: Policy = Field(
        "ifd_rifd",
        description="Which rewrites are chosen: ifd_rifd takes instructions of higher IFD and responses of lower r-IFD "
        "(the papers' version 2), ifd compares only instructions and takes every parsed better response, perplexity "
        "takes the pair whose response has the lower perplexity, reward takes the pair that select.reward_model scores "
        "higher, judge takes the pair that the teacher of the stage judge scores higher from 1 to 10 (up to four more "
        "short calls per row), none takes every parsed reflection and loads no model.",
    )
    reward_model: str = Field(
        "",
        description="The model that scores answers under policy reward: a folder or hub id of a "
        "sequence-classification model with one label; it runs in the actors of the section score.",
    )
    judge_max_tokens: int = Field(256, ge=16, description="Longest verdict under policy judge, in tokens.")
    judge_prompt: PromptConfig = Field(SHIPPED, description="Own words for the judge under policy judge.")
    keep_unreflected_responses: bool = Field(
        True,
        description="Keep rows whose better response was not chosen; false drops them, as the paper does.",
    )

    require_final_ifd: bool = Field(
        True,
        description="Under policy ifd_rifd, choose a better response only if its own IFD is also below 1, as the "
        "authors' code does.",
    )

    @model_validator(mode="after")
    def _own_words_need_a_judge(self) -> Self:
        if self.judge_prompt != SHIPPED and self.policy != "judge":
            raise ValueError(f"judge_prompt has no effect under policy: {self.policy}; set judge, or leave it out")
        return self

    @model_validator(mode="after")
    def _reward_needs_a_model(self) -> Self:
        if self.policy == "reward" and not self.reward_model:
            raise ValueError("policy: reward needs reward_model, a sequence-classification model with one label")
        return self

    def identity(self) -> dict[str, Any]:
        """As for every stage, but keys that were added later only if they are set, so that older work stays valid."""
        later = SelectConfig().model_dump(mode="json", include={"reward_model", "judge_max_tokens", "judge_prompt"})
        return {name: value for name, value in super().identity().items() if name not in later or value != later[name]}

    def first_measure(self) -> Measure | None:
        """The score that the choice of instructions compares; None if it compares none."""
        if self.policy == "ifd_rifd":
            return "ifd"
        return None if self.policy == "none" else self.policy

    def second_measure(self) -> Measure | None:
        """The score that the choice of responses compares; None if it compares none."""
        if self.policy == "ifd_rifd":
            return "rifd"
        return self.policy if self.policy in ("perplexity", "reward", "judge") else None
