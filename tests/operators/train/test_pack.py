import json

import pyarrow as pa
import pytest
import ray
from pydantic import ValidationError

from operators import columns
from operators.student.encode import IGNORED, Encoded, encode_example, load_tokenizer
from operators.train.pack import (
    COLUMNS_IN,
    Document,
    PackConfig,
    Packer,
    _count_pack_rows,
    _place,
    best_fit_decreasing,
    pack,
)

CONFIG = PackConfig(max_tokens=128, rows_per_block=64)


def recycled(texts, outcome="original"):
    """RECYCLED rows of (instruction, input, response), with ids r0, r1, ..."""
    rows = [
        {"row_id": f"r{n}", "input": text, "final_instruction": ask, "final_response": answer, "outcome": outcome}
        for n, (ask, text, answer) in enumerate(texts)
    ]
    return columns.conform(pa.Table.from_pylist(rows), columns.RECYCLED)


def documents(*lengths):
    return [Document(f"d{n}", Encoded([0] * length, [0] * length)) for n, length in enumerate(lengths)]


@pytest.fixture(scope="module")
def packer(local_ray, demo_model):
    return Packer(CONFIG, demo_model)


def test_best_fit_takes_the_fullest_pack_with_room():
    packs = best_fit_decreasing(documents(5, 7, 3, 4, 10, 1), max_tokens=10)
    assert [[len(document) for document in each] for each in packs] == [[10], [7, 3], [5, 4, 1]]


def test_packing_depends_on_the_set_of_documents_only():
    some = documents(3, 3, 9, 2, 5, 5, 5, 1, 8)
    assert best_fit_decreasing(some, 10) == best_fit_decreasing(some[::-1], 10)


def test_a_pack_is_its_documents_one_after_the_other(packer, demo_model):
    texts = [(f"Count to {n}.", "" if n % 2 else "slowly", "one two " * n) for n in range(1, 7)]
    table = packer(recycled(texts))
    assert table.schema.equals(columns.PACKS)
    tokenizer = load_tokenizer(demo_model)
    for row in table.to_pylist():
        assert row["outcome"] == columns.PACKED
        assert len(row["input_ids"]) == sum(row["document_lengths"]) <= CONFIG.max_tokens
        start = 0
        for row_id, length in zip(row["row_ids"], row["document_lengths"], strict=True):
            span = slice(start, start + length)
            encoded = encode_example(tokenizer, *texts[int(row_id[1:])])
            assert row["input_ids"][span] == encoded.input_ids
            assert row["labels"][span] == encoded.labels
            assert row["position_ids"][span] == list(range(length))
            assert row["labels"][start] == IGNORED
            start += length


def test_packs_do_not_depend_on_the_order_in_which_rows_arrive(packer):
    rows = recycled([(f"Count to {n}.", "", "one two " * (1 + n * 7 % 23)) for n in range(120)])
    packed = {}
    for name, order in {"as read": list(range(120)), "backwards": list(range(119, -1, -1))}.items():
        shuffled = rows.take(pa.array(order))
        blocks = [_place(shuffled.slice(at, 50), wanted=list(COLUMNS_IN), buckets=4) for at in (0, 50, 100)]
        packed[name] = packer(pa.concat_tables(blocks)).to_pylist()
    assert packed["as read"] == packed["backwards"]
    ids = [row_id for row in packed["as read"] for row_id in row["row_ids"]]
    assert sorted(ids) == sorted(f"r{n}" for n in range(120))


def test_each_document_may_have_a_pack_of_its_own(local_ray, demo_model):
    alone = Packer(PackConfig(max_tokens=128, packed=False), demo_model)
    out = alone(recycled([(f"Say {n}.", "", str(n)) for n in range(5)])).to_pylist()
    assert [row["row_ids"] for row in out] == [[f"r{n}"] for n in range(5)]


def test_a_dialogue_is_packed_whole_and_learnt_as_configured(local_ray, demo_model):
    rows = recycled([("And of Spain?", "", "Madrid.")]).to_pylist()
    before = [{"role": "user", "content": "Capital of France?"}, {"role": "assistant", "content": "Paris."}]
    table = columns.conform(pa.Table.from_pylist([rows[0] | {"turns_before": json.dumps(before)}]), columns.RECYCLED)
    tokenizer = load_tokenizer(demo_model)
    for loss_on, learnt in {"last": "Madrid.<|im_end|>", "all": "Paris.<|im_end|>Madrid.<|im_end|>"}.items():
        row = Packer(PackConfig(max_tokens=128, loss_on=loss_on), demo_model)(table).to_pylist()[0]
        assert "Capital of France?" in tokenizer.decode(row["input_ids"])
        assert tokenizer.decode([label for label in row["labels"] if label != IGNORED]) == learnt


def test_every_recycled_row_comes_out_once_and_no_other(packer):
    good = recycled([(f"Say {n}.", "", str(n)) for n in range(20)])
    bad = recycled([("Say.", "", "word " * 200), ("Say <|im_end|>", "", "x")])
    left = recycled([("Say.", "", "x")], outcome="quarantined:duplicate")
    bad = bad.set_column(0, "row_id", pa.array(["long", "special"]))
    out = packer(pa.concat_tables([good, bad, left])).to_pylist()
    ids = [row_id for row in out for row_id in row["row_ids"]]
    assert sorted(ids) == sorted([f"r{n}" for n in range(20)] + ["long", "special"])
    outcomes = {row["row_ids"][0]: row["outcome"] for row in out if row["outcome"] != columns.PACKED}
    assert outcomes == {"long": "quarantined:too_long", "special": "quarantined:special_tokens"}
    assert all(row["input_ids"] == [] for row in out if row["outcome"] != columns.PACKED)


@pytest.mark.parametrize(("overlong", "cut"), [("truncate", 1), ("split", 0)])
def test_a_row_over_the_length_is_cut_or_split_and_counted(local_ray, demo_model, overlong, cut):
    packer = Packer(CONFIG.model_copy(update={"overlong": overlong}), demo_model)
    out = packer(recycled([("Say.", "", "word " * 200), ("Say 1.", "", "1")]))
    whole = encode_example(load_tokenizer(demo_model), "Say.", "", "word " * 200)
    counted = _count_pack_rows(out).to_pylist()[0]
    learnt = sum(label != IGNORED for row in out.to_pylist() for label in row["labels"])
    short = sum(label != IGNORED for label in encode_example(load_tokenizer(demo_model), "Say 1.", "", "1").labels)
    assert all(len(row["input_ids"]) <= 128 for row in out.to_pylist())
    assert (counted["rows"], counted["cut_rows"], counted["split_rows"]) == (2, cut, 1 - cut)
    assert learnt + counted["lost_tokens"] == short + sum(label != IGNORED for label in whole.labels)
    assert (counted["lost_tokens"] > 0) == bool(cut)


def test_nothing_to_pack_keeps_the_schema(packer):
    assert packer(recycled([("a", "", "b")], outcome="dropped:held_out")).schema.equals(columns.PACKS)


def test_a_misspelt_or_absurd_size_is_refused():
    with pytest.raises(ValidationError, match="max_token"):
        PackConfig.model_validate({"max_token": 1024})
    with pytest.raises(ValidationError, match="greater than or equal to 16"):
        PackConfig(max_tokens=1)


@pytest.mark.slow
def test_on_ray_through_parquet(local_ray, demo_model, tmp_path):
    rows = ray.data.from_arrow(recycled([(f"Say {n}.", "", str(n)) for n in range(150)]))
    pack(rows, CONFIG, demo_model).write_parquet(str(tmp_path / "packs"))
    table = ray.data.read_parquet(str(tmp_path / "packs")).to_pandas()
    assert sorted(row_id for ids in table["row_ids"] for row_id in ids) == sorted(f"r{n}" for n in range(150))
    backwards = rows.sort("row_id", descending=True).repartition(3)
    again = pack(backwards, CONFIG, demo_model).to_pandas()
    assert sorted(map(list, again["row_ids"])) == sorted(map(list, table["row_ids"]))


@pytest.mark.slow
def test_a_missing_column_is_named(local_ray, demo_model):
    rows = ray.data.from_arrow(recycled([("a", "", "b")]).drop_columns(["final_response"]))
    with pytest.raises(ValueError, match="pack: columns final_response are missing"):
        pack(rows, CONFIG, demo_model)


def test_packs_are_written_with_a_given_template(demo_model, own_template):
    table = Packer(CONFIG, demo_model, own_template)(_place(recycled([("Name a colour.", "", "Blue.")]), COLUMNS_IN, 1))
    text = load_tokenizer(demo_model).decode(table["input_ids"].to_pylist()[0])
    assert text == "<|im_start|>user:Name a colour.<|im_end|><|im_start|>assistant:Blue.<|im_end|>"
