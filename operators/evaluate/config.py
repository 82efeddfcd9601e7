"""Configuration of the evaluation: what is compared, where the two models run, and why a row may have no loss."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Self

from pydantic import Field

from operators.stage import Operational
from operators.student.encode import LossOn
from operators.student.pool import StudentPoolConfig

MAX_SAMPLES = 5000  # samples are held by the driver and shown in the report
OVER_LONG, NOT_FINITE = "over_max_tokens", "not_finite"


class EvaluateConfig(StudentPoolConfig):
    """What is compared, and where the two models run."""

    num_samples: int = Field(
        32, ge=0, le=MAX_SAMPLES, description="Number of held-out rows that both models answer and the judge compares."
    )
    max_new_tokens: int = Field(256, ge=1, description="Longest sample answer in tokens.")
    repetition_penalty: float = Field(
        1.0, gt=0, description="Factor that lowers the score of a token that was used already; 1 changes nothing."
    )
    generate_rows: Operational[int] = Field(
        16, ge=1, description="Number of sample answers that one actor decodes at once."
    )
    judge: bool = Field(True, description="Whether the teacher compares the sample answers.")
    judge_critique: bool = Field(True, description="Whether the judge explains itself before it scores.")
    judge_max_tokens: int = Field(256, ge=16, description="Longest verdict of the judge in tokens.")
    max_tokens: int = Field(
        2048,
        ge=2,
        description="Length of the longest sequence that is scored, in tokens; the report counts longer ones. At least "
        "pack.max_tokens unless it is set.",
    )
    precision: Literal["fp32", "bf16"] = Field(
        "fp32", description="Number format of base model and student; as train.precision unless it is set."
    )
    gpus_per_actor: Operational[float] = Field(
        0, ge=0, description="GPUs that an actor reserves, 0 for CPUs; as train.gpus_per_worker unless it is set."
    )
    loss_on: LossOn = Field(
        "last", description="Turns of a dialogue whose loss is measured; as pack.loss_on unless it is set."
    )

    def following(self, *, gpus_per_worker: float, precision: str, longest_pack: int, loss_on: LossOn) -> Self:
        """Fill in what is not configured from the training: GPUs, number format, loss, and the length of its packs.

        To evaluate a model that is trained on GPUs would take days on one CPU thread, and short rows say little about a
        model that is trained on long ones.

        Args:
            gpus_per_worker: of the student's training.
            precision: of the student's training.
            longest_pack: `pack.max_tokens`.
            loss_on: `pack.loss_on`.
        """
        follows = {
            "gpus_per_actor": gpus_per_worker,
            "precision": precision,
            "max_tokens": max(self.max_tokens, longest_pack),
            "loss_on": loss_on,
        }
        return self.model_copy(update={key: new for key, new in follows.items() if key not in self.model_fields_set})


@dataclass(frozen=True)
class TrainedAttention:
    """The attention with which a student was trained and is evaluated.

    Attributes:
        name: "hyper_attention", or any other name for exact attention.
        sizes: fields of `kernels.hyper_attention.HyperAttentionConfig`.
        layers: which layers use it; the others are exact.
    """

    name: str = "sdpa"
    sizes: dict[str, Any] = field(default_factory=dict)
    layers: str | Sequence[int] = "all"
