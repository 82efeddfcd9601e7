"""A folder with two small tasks of lm-evaluation-harness, one of which fails when its answers are read."""

import json
from pathlib import Path

CHOICE = """
task: capitals
dataset_path: json
dataset_kwargs: {data_files: {test: capitals.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
FAILS = """
include: capitals.yaml
task: broken
process_results: !function answers.read
"""
CODE = "def read(doc, results):\n    raise RuntimeError('no such answer')\n"
ROWS = [("France", "Paris", "Rome"), ("Italy", "Rome", "Oslo"), ("Norway", "Oslo", "Paris"), ("Spain", "Madrid", "Ulm")]


def write_tasks(folder: Path) -> str:
    """Write the tasks `capitals` and `broken`; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "capitals.yaml").write_text(CHOICE)
    (folder / "broken.yaml").write_text(FAILS)
    (folder / "answers.py").write_text(CODE)
    with (folder / "capitals.jsonl").open("w") as file:
        for place, (country, right, wrong) in enumerate(ROWS):
            choices = [right, wrong] if place % 2 == 0 else [wrong, right]
            row = {"question": f"The capital of {country} is", "choices": choices, "answer": place % 2}
            file.write(f"{json.dumps(row)}\n")
    return str(folder)
