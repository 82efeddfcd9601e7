"""The end of a run prints a line for each thing that needs a person's attention."""

import io
from pathlib import Path
from typing import Any

from cluster.manifest import Manifest
from flows.config import load_config
from flows.made import tell_what_was_made
from flows.recycle_and_train import GRAPH
from flows.run import open_run

SMOKE = Path(__file__).parents[2] / "configs" / "smoke.yaml"


def told(storage: Path, asset: str, **kept: Any) -> list[str]:
    """The lines about problems."""
    return printed(storage, asset, **kept)[1]


def printed(storage: Path, asset: str, **kept: Any) -> tuple[list[str], list[str]]:
    """The lines of results and those about problems."""
    run = open_run(load_config(SMOKE, [f"storage={storage}"]), GRAPH.specs)
    folder = storage / "assets" / asset / "refresh=a"
    folder.mkdir(parents=True)
    manifest = Manifest(fingerprint="x", made_from={}, rows=48, **kept)
    (folder / "manifest.json").write_text(manifest.model_dump_json())
    (folder / "_SUCCESS").touch()
    run.store.made.add((asset, "a"))
    out, err = io.StringIO(), io.StringIO()
    tell_what_was_made(run, (out, err))
    assert out.getvalue().startswith(f"made {asset}: 48 rows in ")
    return out.getvalue().splitlines(), err.getvalue().splitlines()


def test_unused_columns_of_the_source_are_named_with_their_cure(tmp_path: Path) -> None:
    outcomes = {"": 40, "dropped:duplicate": 2, "quarantined:invalid_utf8": 5, "quarantined:own_failed": 1}
    metrics: Any = {"ignored_columns": {"context": 7, "system": 1}}
    bad, unread = told(tmp_path, "raw_instructions", outcomes=outcomes, metrics=metrics)
    assert bad.startswith("raw_instructions: 6 of 48 records cannot be used: invalid_utf8 5 (save the file as UTF-8")
    assert bad.endswith("own_failed 1 (your step raised an error on it; --doctor shows the first one)")
    assert "nothing reads these columns of the source: context (7 rows), system (1 rows)" in unread


def test_replies_that_could_not_be_read_and_failed_calls_are_named(tmp_path: Path) -> None:
    metrics: Any = {"failed_calls": 2, "retryable_calls": 1, "unread_replies": {"no_json": 12, "cut_off": 3}}
    failed, unread = told(tmp_path, "instruction_reflections", metrics=metrics)
    assert failed.endswith("2 teacher calls failed; the next run makes 1 of them again")
    assert "15 replies could not be read" in unread
    assert "no_json 12, cut_off 3" in unread


def test_rows_whose_calls_failed_in_earlier_runs_are_named_too(tmp_path: Path) -> None:
    metrics: Any = {"failed_calls": 0, "retryable_calls": 0, "unread_replies": {}, "rows_without_reply": 7}
    [line] = told(tmp_path, "response_reflections", metrics=metrics)
    assert "7 rows have no reply" in line
    assert "after teacher.max_attempts a call is not made again" in line


def test_a_run_without_problems_has_no_line(tmp_path: Path) -> None:
    assert told(tmp_path, "raw_instructions", outcomes={"": 48}, metrics={"ignored_columns": {}}) == []


def test_scores_on_tasks_are_printed_and_failed_tasks_are_named(tmp_path: Path) -> None:
    score: Any = {"task": "arc_easy", "metric": "acc", "scores": {"base": 0.25, "student": 0.5}}
    failed = {"role": "student", "task": "own", "reason": "KeyError: 'answer'"}
    value: Any = {"harness": {"scores": [score], "failed": [failed]}}
    (_, line), problems = printed(tmp_path, "evaluation", value=value)
    assert line == "evaluation: arc_easy acc: base 0.2500, student 0.5000"
    assert problems == ["evaluation: task own failed for student: KeyError: 'answer'"]


def test_how_many_rows_each_reason_took_is_printed_and_many_lookalikes_are_a_problem(tmp_path: Path) -> None:
    outcomes = {"": 30, "dropped:held_out": 2, "dropped:near_duplicate": 15, "dropped:clean": 1, "dropped:duplicate": 0}
    (_, line), [problem] = printed(tmp_path, "raw_instructions", outcomes=outcomes)
    assert line == "raw_instructions: 18 of 48 rows are left out: near_duplicate 15, held_out 2, clean 1"
    assert problem.startswith("raw_instructions: 15 of 48 rows resemble other rows or evaluation texts")
    few = {"": 44, "dropped:near_duplicate": 4}
    assert printed(tmp_path / "few", "raw_instructions", outcomes=few)[1] == []
    recycled = {"both": 46, "dropped:response_not_reflected": 2}
    (_, line), problems = printed(tmp_path / "last", "recycled_instructions", outcomes=recycled)
    assert line == "recycled_instructions: 2 of 48 rows are left out: response_not_reflected 2"
    assert problems == []


def test_files_of_other_splits_are_named(tmp_path: Path) -> None:
    metrics: Any = {"files_of_other_splits": {"test": 2, "validation": 1}}
    [line] = told(tmp_path, "raw_instructions", metrics=metrics)
    assert line == "raw_instructions: 3 files of other splits were not read: test 2, validation 1; see source.split"


def test_general_data_that_is_left_out_is_counted(tmp_path: Path) -> None:
    outcomes = {"": 90, "dropped:contaminated": 7, "quarantined:malformed_json": 3}
    [line] = told(tmp_path, "packed_sequences", metrics={"general_outcomes": outcomes, "general_rows": 40})
    assert line == (
        "packed_sequences: general data: 90 of 100 records can be used, 40 of them are drawn; left out: "
        "contaminated 7, malformed_json 3 (write one JSON object per line, or one array)"
    )


def test_the_notes_of_a_training_are_printed(tmp_path: Path) -> None:
    value: Any = {"notes": ["train.start: released, but no student is released yet"]}
    assert told(tmp_path, "student", value=value) == ["student: train.start: released, but no student is released yet"]
