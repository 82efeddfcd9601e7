"""The teacher's cost by stage and the errors of its failed calls, over all runs of the storage."""

from collections import Counter

import pyarrow.compute as pc
from pydantic import BaseModel, ConfigDict, Field

from operators.parquet_log import ParquetLog
from operators.teacher.budget import BudgetConfig, Tokens

MOST_FAILURES = 5  # kinds that are named; the others are counted together
FAILURE_CHARS = 200
OTHERS = "other errors"


class StageCost(BaseModel):
    """The stored calls of one stage.

    Attributes:
        stage: as in the ledger, such as `reflect_instructions_repair`.
        calls: stored calls, including the failed ones.
        failed: calls without a reply.
        prompt_tokens: tokens that the teacher read.
        generated_tokens: tokens that it wrote.
        cost: at the prices of the configuration, in their unit.
        failures: text of an error -> number of calls that failed with it, the most frequent first.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    stage: str
    calls: int
    failed: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    cost: float = 0.0
    failures: dict[str, int] = Field(default_factory=dict)


def stage_costs(ledger: ParquetLog, prices: BudgetConfig) -> list[StageCost]:
    """One line per stage of the ledger, sorted by name; reads three columns on the caller's machine."""
    return [stage_cost(ledger, stage, prices) for stage in sorted(ledger.stages())]


def stage_cost(ledger: ParquetLog, stage: str, prices: BudgetConfig) -> StageCost:
    """The line of one stage."""
    calls, used, errors = 0, Tokens(), Counter[str]()
    for batch in ledger.batches(stage, ["prompt_tokens", "generated_tokens", "error"]):
        calls += batch.num_rows
        used += Tokens(*(pc.sum(batch[name]).as_py() or 0 for name in ("prompt_tokens", "generated_tokens")))
        errors.update({item["values"]: item["counts"] for item in pc.value_counts(batch["error"]).to_pylist()})
    failures = Counter[str]()
    for words, number in errors.items():
        if words:
            failures[" ".join(words.split())[:FAILURE_CHARS]] += number
    named = dict(failures.most_common(MOST_FAILURES))
    others = failures.total() - sum(named.values())
    return StageCost(
        stage=stage,
        calls=calls,
        failed=failures.total(),
        prompt_tokens=used.prompt,
        generated_tokens=used.generated,
        cost=prices.cost(used),
        failures=named | ({OTHERS: others} if others else {}),
    )
