"""What is compared, where the two models run, and the reasons why a row has no loss."""

from pydantic import Field

from operators.stage import Operational
from operators.student.pool import StudentPoolConfig

MAX_SAMPLES = 5000  # samples are held by the driver and shown in the report
OVER_LONG, NOT_FINITE = "over_max_tokens", "not_finite"


class EvaluateConfig(StudentPoolConfig):
    """What is compared, and where the two models run."""

    num_samples: int = Field(32, ge=0, le=MAX_SAMPLES, description="held-out rows that both models answer")
    max_new_tokens: int = Field(256, ge=1, description="of one sample answer")
    repetition_penalty: float = Field(1.0, gt=0, description="1 is plain greedy decoding")
    generate_rows: Operational[int] = Field(16, ge=1, description="answers decoded at once by one actor")
    judge: bool = Field(True, description="have the teacher compare the sample answers")
    judge_critique: bool = Field(True, description="the judge explains itself before it scores")
    judge_max_tokens: int = Field(256, ge=16, description="of one verdict")
