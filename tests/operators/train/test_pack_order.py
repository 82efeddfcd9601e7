import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from operators import columns
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


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_an_epoch_sees_each_pack_once_whatever_the_world(world_size):
    plan = PackOrder(num_packs=11, packs_per_step=4, seed=7)
    assert plan.steps_per_epoch == 3
    for epoch in range(2):
        steps = range(epoch * 3, epoch * 3 + 3)
        shares = [plan.share(step, rank, world_size) for step in steps for rank in range(world_size)]
        assert len({len(share) for share in shares}) == 1
        assert sorted(index for share in shares for index in share if index is not None) == list(range(11))


def test_a_step_has_the_same_packs_whatever_the_world():
    plan = PackOrder(num_packs=11, packs_per_step=4, seed=7)
    for step in range(6):
        for world_size in (1, 2, 3):
            packs = {i for rank in range(world_size) for i in plan.share(step, rank, world_size) if i is not None}
            assert packs == set(plan.packs_of(step))


def test_order_changes_with_epoch_and_seed():
    first, other = PackOrder(50, 50, seed=0), PackOrder(50, 50, seed=1)
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


def test_no_pack_is_an_error(tmp_path):
    files = [write_packs(tmp_path / "1.parquet", ["x"], outcome="quarantined:too_long")]
    with pytest.raises(ValueError, match="train: no pack in 1 files"):
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
