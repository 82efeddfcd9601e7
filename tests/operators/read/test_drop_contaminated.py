"""Decontamination: evaluation texts from any source are found in rows and rewrites; other texts are not."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray

from operators.columns import HELD_OUT, RAW, conform
from operators.read.drop_contaminated import (
    CONTAMINATED,
    DecontaminateConfig,
    drop_contaminated,
    evaluation_index,
    examine_files,
)

QUESTION = "A train leaves the station at nine and travels north at sixty miles an hour; when does it arrive?"
OTHER = "Explain in two sentences why the sky looks blue on a clear day and red in the evening."
HALF = "A train leaves the station at nine and travels north. Describe the passengers that you can imagine on board."


def rows(**texts: tuple[str, str]) -> "ray.data.Dataset":
    """Rows of id = (instruction, outcome)."""
    table = pa.table(
        {
            "row_id": list(texts),
            "instruction": [text for text, _ in texts.values()],
            "input": [""] * len(texts),
            "outcome": [outcome for _, outcome in texts.values()],
        }
    )
    return ray.data.from_arrow(conform(table, RAW))


def judged(
    source: "ray.data.Dataset", config: DecontaminateConfig, others: "ray.data.Dataset | None" = None
) -> dict[str, str]:
    found = drop_contaminated(source, evaluation_index(source, others, config))
    return {row["row_id"]: row["outcome"] for row in found.take_all()}


@pytest.mark.usefixtures("local_ray")
class TestDropContaminated:
    def test_rows_that_repeat_a_row_held_out_are_dropped(self) -> None:
        source = rows(
            a=(QUESTION, HELD_OUT),
            b=(QUESTION.upper(), ""),
            c=(OTHER, ""),
            d=(HALF, ""),
            e=(QUESTION, "quarantined:too_long"),
        )
        found = judged(source, DecontaminateConfig())
        expected = {"a": HELD_OUT, "b": CONTAMINATED, "c": "", "d": "", "e": "quarantined:too_long"}
        assert found == expected
        strict = judged(source, DecontaminateConfig(max_overlap=0.1))
        assert strict == expected | {"d": CONTAMINATED}
        assert judged(source, DecontaminateConfig(held_out=False))["b"] == ""

    def test_rows_held_out_of_another_refresh_count(self) -> None:
        found = judged(rows(a=(QUESTION, "")), DecontaminateConfig(), rows(z=(QUESTION, HELD_OUT)))
        assert found == {"a": CONTAMINATED}

    @pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet"])
    def test_files_of_any_format_and_usual_fields_count(self, tmp_path: Path, suffix: str) -> None:
        record = {"question": QUESTION, "answer": "At noon."}
        file = tmp_path / f"evaluation.{suffix}"
        if suffix == "parquet":
            pq.write_table(pa.Table.from_pylist([record]), file)
        else:
            file.write_text(json.dumps([record] if suffix == "json" else record))
        config = DecontaminateConfig(held_out=False, files=[str(file)])
        found = judged(rows(a=(QUESTION, ""), b=(OTHER, "")), config)
        assert found == {"a": CONTAMINATED, "b": ""}

    def test_chats_count_by_what_the_user_says(self, tmp_path: Path) -> None:
        turns = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": OTHER}]
        (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": turns}))
        config = DecontaminateConfig(held_out=False, files=[str(tmp_path)])
        found = judged(rows(a=(QUESTION, ""), b=(OTHER, "")), config)
        assert found == {"a": CONTAMINATED, "b": ""}

    def test_a_file_that_is_not_there_is_an_error(self, tmp_path: Path) -> None:
        config = DecontaminateConfig(files=[str(tmp_path / "none.jsonl")])
        with pytest.raises(ValueError, match=r"^decontaminate\.files: .*none\.jsonl"):
            evaluation_index(rows(a=(OTHER, "")), None, config)
        [finding] = examine_files(config)
        assert finding.fatal
        assert str(finding).startswith("decontaminate.files: ")
        assert [*examine_files(DecontaminateConfig())] == []

    def test_an_empty_index_contaminates_nothing(self) -> None:
        assert (
            evaluation_index(rows(a=(OTHER, "")), None, DecontaminateConfig()).contaminates([OTHER, ""]) == [False] * 2
        )

    def test_a_template_that_many_rows_share_is_no_evidence_and_a_leak_inside_it_is_found(self) -> None:
        template = (
            "You are a careful translator. Translate the sentence below from English into plain modern French, keep "
            "its tone and its register, add nothing of your own, and write the translation only, without quotes: "
        )
        subjects = ("my cousin", "the baker", "our doctor", "a gardener", "the pilot", "her teacher", "one sailor")
        acts = ("sold a red bicycle to", "wrote a long letter for", "lost the brass key of", "painted an old boat with")
        texts = [f"{template}{a} {act} friend number {n}." for n, a in enumerate(subjects) for act in acts]
        source = {f"r{number}": (text, "") for number, text in enumerate(texts)}
        leaked = f"{template}In spring nine tired riders crossed the frozen river behind the mill at dawn."
        source |= {"held": (leaked, HELD_OUT), "leak": (leaked.replace("at dawn", "at dusk"), "")}
        found = judged(rows(**source), DecontaminateConfig())
        assert found == {name: outcome for name, (_, outcome) in source.items()} | {"leak": CONTAMINATED}
        before = judged(rows(**source), DecontaminateConfig(common_rows=10_000))
        assert list(before.values()).count(CONTAMINATED) > 20  # as was the case when every run of words was evidence

    def test_rows_of_other_refreshes_make_a_template_common_too(self) -> None:
        template = "Say in one word what feeling the writer of the following review of a hotel has: "
        new = rows(a=(f"{template}fine beds.", ""), z=(f"{template}cold soup.", HELD_OUT))
        others = rows(**{f"o{n}": (f"{template}room number {n}.", "") for n in range(20)})
        assert judged(new, DecontaminateConfig())["a"] == CONTAMINATED
        assert judged(new, DecontaminateConfig(), others)["a"] == ""

    def test_a_question_with_other_words_around_it_is_found(self) -> None:
        wrapped = f"My teacher gave me this exercise and I am stuck, so please help: {QUESTION} Thank you very much!"
        long = f"{OTHER} " * 8
        found = judged(
            rows(a=(QUESTION, HELD_OUT), b=(wrapped, ""), c=(f"{long} {QUESTION}", ""), d=(long, "")),
            DecontaminateConfig(),
        )
        assert found == {"a": HELD_OUT, "b": CONTAMINATED, "c": CONTAMINATED, "d": ""}

    @pytest.mark.parametrize("column", ["turns_before", "turns_after"])
    def test_a_leak_in_another_turn_is_found(self, column: str) -> None:
        """A case from an audit: only the pair that the teacher reflects on was compared."""
        turns = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": OTHER}]
        polite = [{"role": "user", "content": "Thanks!"}]
        table = rows(a=(QUESTION, HELD_OUT), t=("Thanks!", HELD_OUT), b=(OTHER, ""), c=(HALF, "")).take_all()
        table[2][column], table[3][column] = json.dumps(turns), json.dumps(polite)
        source = ray.data.from_arrow(pa.Table.from_pylist(table, schema=RAW))
        assert judged(source, DecontaminateConfig()) == {"a": HELD_OUT, "t": HELD_OUT, "b": CONTAMINATED, "c": ""}

    def test_the_number_of_evaluation_texts_is_known(self, tmp_path: Path) -> None:
        (tmp_path / "bench.jsonl").write_text(json.dumps({"turns": [QUESTION, OTHER]}))
        config = DecontaminateConfig(files=[str(tmp_path)])
        source = rows(a=(HALF, HELD_OUT), b=(OTHER.upper(), ""))
        assert evaluation_index(source, None, config).num_texts() == 3
        assert judged(source, config)["b"] == CONTAMINATED
