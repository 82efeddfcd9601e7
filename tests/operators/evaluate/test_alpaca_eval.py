"""The files that AlpacaEval reads. That a run writes them is shown in the tests of the flow."""

import json

from operators.evaluate.alpaca_eval import alpaca_eval_files
from operators.evaluate.results import Sample


def sample(row_id: str, **texts: str) -> Sample:
    found = {"instruction": "Name it.", "input": "", "reference": "", "base": "A", "student": "B", **texts}
    return Sample(row_id=row_id, base_tokens=1, student_tokens=1, **found)


def test_both_files_hold_the_same_instructions_in_one_order() -> None:
    turns = json.dumps([{"role": "user", "content": "Hello"}])
    samples = [sample("1"), sample("2", input="a cat", student="Bé"), sample("3", turns_before=turns)]
    files = {name: json.loads(text) for name, text in alpaca_eval_files(samples, "small", "small-20261127").items()}
    assert [record["instruction"] for record in files["student.json"]] == ["Name it.", "Name it.\n\na cat"]
    assert [record["instruction"] for record in files["base.json"]] == ["Name it.", "Name it.\n\na cat"]
    assert [record["output"] for record in files["student.json"]] == ["B", "Bé"]
    assert {record["generator"] for record in files["student.json"]} == {"small-20261127"}
    assert {record["generator"] for record in files["base.json"]} == {"small"}
