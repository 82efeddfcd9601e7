"""Dagster's IO manager makes stale assets only, and passes values on with their types."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
from pydantic import BaseModel

from cluster.storage import AssetStore, Recipe
from flows.asset_io import AssetIO
from flows.graph import EVALUATION


class Found(BaseModel):
    """A value of an asset."""

    loss: float


class MadeFrom:
    """The inputs of assets, which a test sets."""

    said: Mapping[str, Any] = {"code": "1"}

    def describe(self, asset: str, refresh: str | None) -> Mapping[str, Any]:
        return self.said


@pytest.fixture
def made() -> list[str]:
    return []


def asset_io(storage: Path, made: list[str], made_from: MadeFrom, **options: Any) -> AssetIO:
    return AssetIO(AssetStore(str(storage)), made_from, {}, before_making=made.append, **options)  # type: ignore[arg-type]


def handle(asset_io: AssetIO, loss: float) -> Mapping[str, Any]:
    context = dg.build_output_context(asset_key=dg.AssetKey(EVALUATION))
    asset_io.handle_output(context, Recipe(lambda: Found(loss=loss), metrics=lambda found: {"loss": found.loss}))
    return {name: value.value for name, value in context.get_logged_metadata().items()}


def read(asset_io: AssetIO, kind: type) -> Any:
    upstream = dg.build_output_context(asset_key=dg.AssetKey(EVALUATION))
    kind_of_dagster = (
        dg.PythonObjectDagsterType(kind)
        if issubclass(kind, BaseModel)
        else dg.DagsterType(lambda *_: True, typing_type=kind, name="Json")
    )
    context = dg.build_input_context(
        asset_key=dg.AssetKey(EVALUATION), upstream_output=upstream, dagster_type=kind_of_dagster
    )
    return asset_io.load_input(context)


def test_an_asset_is_made_once_and_again_when_what_it_is_made_from_changes(tmp_path: Path, made: list[str]) -> None:
    made_from = MadeFrom()
    io = asset_io(tmp_path, made, made_from)
    assert handle(io, 2.0)["metrics"] == {"loss": 2.0}
    handle(io, 3.0)
    assert read(io, Found) == Found(loss=2.0)
    made_from.said = {"code": "2"}
    handle(io, 4.0)
    assert read(io, Found) == Found(loss=4.0)
    assert made == [EVALUATION] * 2


def test_an_asset_that_is_to_be_made_again_is_even_if_it_is_not_stale(tmp_path: Path, made: list[str]) -> None:
    handle(asset_io(tmp_path, made, MadeFrom()), 2.0)
    io = asset_io(tmp_path, made, MadeFrom(), made_again={EVALUATION})
    handle(io, 3.0)
    assert read(io, Found).loss == 3.0
