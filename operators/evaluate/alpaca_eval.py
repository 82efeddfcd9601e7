"""The sample answers in the format of AlpacaEval, whose judges then compare them: one file per model.

    alpaca_eval --model_outputs <version>.student.json --reference_outputs <version>.base.json

Source: github.com/tatsu-lab/alpaca_eval, "Evaluating a model": records with `instruction`, `output`, `generator`.
"""

import json
from collections.abc import Iterable

from operators.evaluate.results import Sample

DATASET = "held_out"


def alpaca_eval_files(samples: Iterable[Sample], base: str, student: str) -> dict[str, str]:
    """The text of the files of both models, by the last part of their names.

    Samples with turns before the instruction are left out: AlpacaEval's records have one turn.

    Args:
        samples: with the answers of both models.
        base: name of the base model; student: name of the student.
    """
    single = [sample for sample in samples if not sample.turns_before]
    records: dict[str, list[dict[str, str]]] = {"base.json": [], "student.json": []}
    for sample in single:
        instruction = f"{sample.instruction}\n\n{sample.input}" if sample.input else sample.instruction
        common = {"dataset": DATASET, "instruction": instruction}
        records["base.json"].append({**common, "output": sample.base, "generator": base})
        records["student.json"].append({**common, "output": sample.student, "generator": student})
    return {name: json.dumps(found, indent=1, ensure_ascii=False) for name, found in records.items()}
