"""Results of evaluations and decisions about releases: frozen, and validated when they are read from JSON."""

from pydantic import BaseModel, ConfigDict, Field

RELEASED, BEST = "released", "best"  # roles of an earlier student in a comparison
WIN, TIE, LOSS, UNPARSED = "win", "tie", "loss", "unparsed"
NUM_QUANTILES = 99


class Result(BaseModel):
    """Base of the results of these stages."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class PairedChange(Result):
    """How far one model's loss lies from another's on the same rows, by a bootstrap over the rows.

    Attributes:
        num_rows: rows that both models scored.
        estimate: nats per token; negative is better. None if there is no row.
        quantiles: of the estimate over resampled rows, from the 1st to the 99th percentile; empty below two rows.
    """

    num_rows: int = 0
    estimate: float | None = None
    quantiles: tuple[float, ...] = ()

    def at(self, share: float) -> float | None:
        """The change that `share` of the resamples do not exceed; the estimate where nothing was resampled."""
        if not self.quantiles:
            return self.estimate
        place = round(share * (NUM_QUANTILES + 1)) - 1
        return self.quantiles[min(max(place, 0), NUM_QUANTILES - 1)]


class HeldOutLoss(Result):
    """Loss of base model and student on the held-out rows.

    Attributes:
        base: nats per response token, weighted by tokens; None if there are no rows or a row's loss is not finite.
        student: as `base`.
        num_tokens: response tokens that were scored.
        num_rows: rows that were scored.
        unscored: rows by the reason why they have no loss.
        change: the student's loss less the base model's, with its uncertainty over rows.
    """

    base: float | None = None
    student: float | None = None
    num_tokens: int = 0
    num_rows: int = 0
    unscored: dict[str, int] = Field(default_factory=dict)
    change: PairedChange = PairedChange()


class Sample(Result):
    """One held-out row with the answers of both models, and the verdict on them if they were judged.

    Attributes:
        row_id: of the held-out row.
        instruction: what was asked.
        input: what it was asked about; may be empty.
        reference: the response in the data.
        turns_before: the turns of the dialogue before the instruction, as JSON; "" if there are none.
        base: the base model's greedy answer.
        student: the student's.
        base_tokens: length of the base model's answer.
        student_tokens: length of the student's answer.
        verdict: of the student: win, tie, loss or unparsed; None if it was not judged.
        scores: order -> (score of base, score of student), None if unparsed.
        unparsed: order -> why the verdict could not be read.
    """

    row_id: str
    instruction: str
    input: str = ""
    reference: str = ""
    turns_before: str = ""
    base: str
    student: str
    base_tokens: int
    student_tokens: int
    verdict: str | None = None
    scores: dict[str, tuple[float, float] | None] = Field(default_factory=dict)
    unparsed: dict[str, str] = Field(default_factory=dict)


class Verdicts(Result):
    """Counts over judged pairs.

    Attributes:
        num_pairs: pairs with a verdict, wins + ties + losses.
        wins: of the student.
        ties: pairs with equal scores, or where the two orders disagree.
        losses: of the student.
        win_margin: (wins - losses) / num_pairs.
        win_rate: (wins + ties / 2) / num_pairs.
        length_controlled_win_rate: what `win_rate` would be with answers of equal length; see `length_control`.
        sign_test_p: probability of so uneven a split of wins and losses between equal models, two-sided.
    """

    num_pairs: int = 0
    wins: int = 0
    ties: int = 0
    losses: int = 0
    win_margin: float | None = None
    win_rate: float | None = None
    length_controlled_win_rate: float | None = None
    sign_test_p: float | None = None


class Judgement(Verdicts):
    """Verdicts on all samples, and on those of about equal length.

    Attributes:
        unparsed: pairs without a verdict.
        unparsed_reasons: reason why a call gave no verdict -> number of calls.
        length_matched: pairs whose answers differ in length by less than a fifth.
        mean_tokens: mean length of the answers of `base` and `student`, tokens.
    """

    unparsed: int = 0
    unparsed_reasons: dict[str, int] = Field(default_factory=dict)
    length_matched: Verdicts = Verdicts()
    mean_tokens: dict[str, float | None] = Field(default_factory=dict)


class Comparison(Result):
    """The student against an earlier one, on the held-out rows and samples on which both were measured.

    Attributes:
        version: of the earlier student.
        role: "released" or "best".
        change: the new student's loss less the earlier one's.
        judge: verdicts on their answers, wins being the new student's; None if they were not judged.
        measured_with: keys with which the earlier one was measured, if they differ from those of the new one, so that
            its losses or answers are not compared; "" if they are the same, and in evaluations of earlier releases.
    """

    version: str
    role: str
    change: PairedChange
    judge: Verdicts | None = None
    measured_with: str = ""


class TaskScore(Result):
    """One metric of one task of lm-evaluation-harness, for each model.

    Attributes:
        task: its name, or that of a group.
        metric: as the harness names it, with the filter of the answers: `acc`, `exact_match (strict-match)`.
        higher_is_better: None if the task does not say so.
        scores: role of a model (base, student, released) -> value.
        errors: role of a model -> standard error, where the harness gives one.
    """

    task: str
    metric: str
    higher_is_better: bool | None = None
    scores: dict[str, float] = Field(default_factory=dict)
    errors: dict[str, float] = Field(default_factory=dict)


class TaskFailure(Result):
    """Why a model has no score on a task; `task` is as configured."""

    role: str
    task: str
    reason: str


class Harness(Result):
    """The tasks of lm-evaluation-harness.

    Attributes:
        version: of the package.
        scores: in the order of the configuration.
        failed: tasks that ended with an error; they do not end the run.
    """

    version: str = ""
    scores: tuple[TaskScore, ...] = ()
    failed: tuple[TaskFailure, ...] = ()


class Evaluation(Result):
    """Everything that was measured of one student.

    Attributes:
        held_out_loss: base model and student.
        samples: held-out rows that both models answered.
        unanswered: samples whose prompt leaves no room for an answer.
        judge: the verdicts on the samples; None if nothing was judged.
        attention: used to measure the student.
        rivals: comparisons with the released student and the best one so far.
        harness: scores on tasks; None if none were configured.
        rows: path of the Parquet file with loss and answer of every held-out row.
    """

    held_out_loss: HeldOutLoss = HeldOutLoss()
    samples: tuple[Sample, ...] = ()
    unanswered: int = 0
    judge: Judgement | None = None
    attention: str = "sdpa"
    rivals: tuple[Comparison, ...] = ()
    harness: Harness | None = None
    rows: str = ""


class Release(Result):
    """What was decided about a student.

    Attributes:
        released: whether it is the released one now.
        version: of the student.
        previous: the version that was released before it; None if there was none.
        reasons: one sentence per check, saying what was compared.
    """

    released: bool
    version: str
    previous: str | None = None
    reasons: tuple[str, ...] = ()
