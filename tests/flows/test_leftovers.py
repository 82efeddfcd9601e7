"""Files that killed writers left, and those that were set aside long ago, are deleted wherever they are."""

import os
import time
from pathlib import Path

import pytest

from flows.leftovers import SET_ASIDE_S, prune_leftovers
from operators.files.atomic import put_file
from operators.parquet_log import UNFINISHED_S

HEX = "0a" * 16
UNFINISHED = [
    f".released.json.{HEX}.unfinished",
    f"releases/.000001.json.{HEX}.unfinished",
    f"refreshes/.2026-11-28.json.{HEX}.unfinished",
    f"evaluations/.v1.parquet.{HEX}.unfinished",
    f"evaluations/tasks/.a.json.{HEX}.unfinished",
    f"assets/raw_instructions/bundles/.{HEX}.parquet.{HEX}.unfinished",
    f"assets/raw_instructions/refresh=base/.manifest.json.{HEX}.unfinished",
    f"students/0123456789abcdef/.manifest.json.{HEX}.unfinished",
    "assets/raw_instructions/refresh=base/.making/a.parquet",
    "published.unfinished/parquet/a.parquet",
]
SET_ASIDE = [
    "ledger/reflect/a.parquet.broken",
    "scores/ifd/0123/b.parquet.broken",
    "ledger/judge/c.parquet.discounted.broken",
]
KEPT = [
    "ledger/judge/c.parquet.discounted",
    "released.json",
    "refreshes/2026-11-28.json",
    "assets/raw_instructions/refresh=base/a.parquet",
    "thesis.unfinished",
    ".thesis.tex.unfinished",
    f"thesis/.chapter.{HEX}.unfinished",
    "thesis/a.parquet.broken",
    f"students/0123456789abcdef/checkpoints/.a.{HEX}.unfinished",
]


def filled(storage: Path, age_s: float) -> None:
    """Files of one age, and folders too."""
    for name in [*UNFINISHED, *SET_ASIDE, *KEPT]:
        put_file(f"{storage}/{name}", name)
    for path in storage.rglob("*"):
        os.utime(path, (time.time() - age_s,) * 2)


def left(storage: Path) -> set[str]:
    return {path.relative_to(storage).as_posix() for path in storage.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("age_s", "gone"),
    [
        (UNFINISHED_S / 2, set()),
        (UNFINISHED_S * 2, {*UNFINISHED}),
        (SET_ASIDE_S * 2, {*UNFINISHED, *SET_ASIDE}),
        (-SET_ASIDE_S, set()),
    ],
)
def test_each_kind_goes_at_its_age_and_nothing_else_does(tmp_path: Path, age_s: float, gone: set[str]) -> None:
    filled(tmp_path, age_s)
    assert len(prune_leftovers(str(tmp_path))) == len(gone)
    assert left(tmp_path) == {*UNFINISHED, *SET_ASIDE, *KEPT} - gone


def test_a_storage_that_is_not_there_has_none(tmp_path: Path) -> None:
    assert prune_leftovers(f"{tmp_path}/none") == []


def test_in_a_bucket_nothing_young_goes(bucket: str) -> None:
    put_file(f"{bucket}/runs/ledger/reflect/a.parquet.broken", "x")
    assert prune_leftovers(f"{bucket}/runs") == []
