from pathlib import Path
from typing import Any

import pyarrow as pa

from operators.parquet_log import ParquetLog, write_whole
from operators.report.costs import OTHERS, stage_cost, stage_costs
from operators.teacher.budget import BudgetConfig
from operators.teacher.ledger import RECORD

PRICES = BudgetConfig(prompt_price=10.0, generated_price=100.0)


def calls(*errors: str) -> pa.Table:
    record: dict[str, Any] = {"prompt_tokens": 1000, "generated_tokens": 100}
    return pa.Table.from_pylist(
        [record | {"call_key": str(n), "error": e} for n, e in enumerate(errors)], schema=RECORD
    )


def test_calls_tokens_cost_and_failures_are_summed_over_all_files(tmp_path: Path) -> None:
    write_whole(f"{tmp_path}/reflect", calls("", "", "429 slow\n down"))
    write_whole(f"{tmp_path}/reflect", calls("429 slow down", "401 wrong key"))
    write_whole(f"{tmp_path}/judge", calls(""))
    judge, reflect = stage_costs(ParquetLog(str(tmp_path)), PRICES)
    assert (judge.stage, judge.calls, judge.failed, judge.failures) == ("judge", 1, 0, {})
    assert (reflect.calls, reflect.failed, reflect.prompt_tokens, reflect.generated_tokens) == (5, 3, 5000, 500)
    assert reflect.cost == 5000 * 10 / 1e6 + 500 * 100 / 1e6
    assert reflect.failures == {"429 slow down": 2, "401 wrong key": 1}


def test_rare_kinds_of_failure_are_counted_together_and_long_words_are_cut(tmp_path: Path) -> None:
    write_whole(f"{tmp_path}/reflect", calls(*(f"error {n}" for n in range(9)), "x" * 1000))
    cost = stage_cost(ParquetLog(str(tmp_path)), "reflect", PRICES)
    assert len(cost.failures) == 6
    assert cost.failures[OTHERS] == 5
    assert sum(cost.failures.values()) == cost.failed == 10


def test_a_ledger_that_does_not_exist_has_no_lines(tmp_path: Path) -> None:
    assert stage_costs(ParquetLog(str(tmp_path / "none")), PRICES) == []
