import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from operators import columns
from operators.train.config import TrainConfig
from operators.train.pack_order import PackOrder, PackStore, document_uid, dummy_pack, read_index


def write_packs(path, names, outcome=columns.PACKED):
    rows = [
        {
            "input_ids": [n, n + 1, n + 2],
            "labels": [-100, n + 1, -100],
            "position_ids": [0, 1, 2],
            "document_lengths": [3],
            "row_ids": [name],
            "outcome": outcome,
        }
        for n, name in enumerate(names)
    ]
    pq.write_table(pa.Table.from_pylist(rows, schema=columns.PACKS), path)
    return str(path)


ORDERS = {
    "packs": PackOrder([1] * 11, 4, seed=7),
    "examples": PackOrder([3, 9, 4, 1, 1, 20, 6, 2, 7, 5, 2], 16, seed=7),
    "fewer packs than steps": PackOrder([100, 100, 1], 10, seed=7),
}


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_an_epoch_sees_each_pack_once_whatever_the_world(order, world_size):
    for epoch in range(2):
        steps = range(epoch * order.steps_per_epoch, (epoch + 1) * order.steps_per_epoch)
        seen = []
        for step in steps:
            shares = [order.share(step, rank, world_size) for rank in range(world_size)]
            assert len({len(share) for share in shares}) == 1
            assert order.packs_of(step), "no step is empty"
            seen += [index for share in shares for index in share if index is not None]
        assert sorted(seen) == list(range(order.num_packs))


def test_a_step_holds_about_as_many_examples_as_configured():
    sizes = [1 + n * 7 % 20 for n in range(1000)]
    order = PackOrder(sizes, 128, seed=0)
    counts = [sum(sizes[index] for index in order.packs_of(step)) for step in range(order.steps_per_epoch)]
    assert order.steps_per_epoch == round(sum(sizes) / 128)
    assert sum(counts) == sum(sizes)
    assert max(abs(count - 128) for count in counts) <= 21  # one pack more or less


def test_a_step_has_the_same_packs_whatever_the_world():
    plan = ORDERS["examples"]
    for step in range(6):
        for world_size in (1, 2, 3):
            packs = {i for rank in range(world_size) for i in plan.share(step, rank, world_size) if i is not None}
            assert packs == set(plan.packs_of(step))


@pytest.mark.parametrize("packs_per_pass", [1, 2, 3, 100])
def test_passes_are_as_many_on_each_worker_and_read_each_pack_once(packs_per_pass):
    for order in ORDERS.values():
        for step in range(order.steps_per_epoch):
            passes = [order.passes(step, rank, 3, packs_per_pass) for rank in range(3)]
            assert len({len(each) for each in passes}) == 1
            read = [index for each in passes for part in each for index in part]
            assert sorted(read) == sorted(order.packs_of(step))


def test_order_changes_with_epoch_and_seed():
    first, other = PackOrder([1] * 50, 50, seed=0), PackOrder([1] * 50, 50, seed=1)
    assert first.packs_of(0) != first.packs_of(1)
    assert first.packs_of(0) != other.packs_of(0)


def test_store_is_in_order_of_row_ids_and_skips_quarantined_rows(tmp_path):
    one = [write_packs(tmp_path / "1.parquet", ["c", "a"]), write_packs(tmp_path / "2.parquet", ["b"])]
    one.append(write_packs(tmp_path / "3.parquet", ["x"], outcome="quarantined:too_long"))
    two = [write_packs(tmp_path / "4.parquet", ["b"]), write_packs(tmp_path / "5.parquet", ["c", "a"])]
    stores = PackStore(one), PackStore(two)
    assert len(stores[0]) == 3
    assert [stores[0].pack(n).document_uids for n in range(3)] == [[document_uid(name)] for name in "abc"]
    assert [stores[0].pack(n) for n in range(3)] == [stores[1].pack(n) for n in range(3)]
    assert stores[0].digest == stores[1].digest == read_index(one).digest
    assert (stores[0].tokens([0, 1]), stores[0].supervised_tokens([0, 1, 2])) == (6, 3)


def test_other_rows_have_another_digest(tmp_path):
    assert (
        read_index([write_packs(tmp_path / "1.parquet", ["a"])]).digest
        != read_index([write_packs(tmp_path / "2.parquet", ["b"])]).digest
    )


def test_no_packs_at_all_is_an_error(tmp_path):
    files = [write_packs(tmp_path / "1.parquet", ["x"], outcome="quarantined:too_long")]
    with pytest.raises(ValueError, match="train: no pack in packed_sequences"):
        read_index(files)


def test_a_pack_whose_documents_do_not_cover_it_names_the_row(tmp_path):
    file = write_packs(tmp_path / "1.parquet", ["a"])
    table = pq.read_table(file)
    pq.write_table(table.set_column(3, "document_lengths", pa.array([[2]], pa.list_(pa.int32()))), file)
    with pytest.raises(ValueError, match="pack of row 'a' has 3 tokens"):
        PackStore([file]).pack(0)


def test_a_dummy_has_no_loss_and_no_document():
    assert set(dummy_pack(2).labels) == {-100}
    assert dummy_pack(2).document_lengths == []


def test_the_rows_of_a_step_are_known_and_each_row_is_seen_once_an_epoch(tmp_path):
    index = read_index([write_packs(tmp_path / "1.parquet", [f"r{n}" for n in range(11)])])
    config = TrainConfig(packs_per_step=4, epochs=2)
    steps = [index.rows_of_step(config, step) for step in range(6)]
    for epoch in (steps[:3], steps[3:]):
        assert sorted(row for rows in epoch for row in rows) == sorted(f"r{n}" for n in range(11))
    assert steps[:3] != steps[3:]
    store = PackStore([str(tmp_path / "1.parquet")])
    learnt = [uid for pack in index.order(config).packs_of(1) for uid in store.pack(pack).document_uids]
    assert learnt == [document_uid(row) for row in steps[1]]
    with pytest.raises(ValueError, match="step 6 of 6"):
        index.rows_of_step(config, 6)


def test_a_row_in_two_packs_is_refused(tmp_path):
    with pytest.raises(ValueError, match="row 'a' is 2 times in the packs"):
        read_index([write_packs(tmp_path / "1.parquet", ["a", "b", "a"])])


def test_only_one_size_of_a_step_may_be_set():
    with pytest.raises(ValidationError, match="examples_per_step: 1 together with tokens_per_step: 2"):
        TrainConfig(examples_per_step=1, tokens_per_step=2)


def test_rows_that_are_kept_for_validation_are_in_no_step(tmp_path):
    index = read_index([write_packs(tmp_path / "packs.parquet", [f"r{n}" for n in range(10)])])
    config = TrainConfig(epochs=1, packs_per_step=3, evaluate_every_steps=1, validation_share=0.2)
    seen = [row_id for step in range(3) for row_id in index.rows_of_step(config, step)]
    assert len(set(seen)) == len(seen) == index.num_trained(config) == 8
    assert index.num_trained(TrainConfig()) == 10
