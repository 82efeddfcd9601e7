"""Dagster's IO manager: makes an asset only if it is stale, and gives its rows or its value to assets that read it."""

from collections.abc import Callable, Collection
from typing import Any

import dagster as dg
from pydantic import BaseModel
from ray.data import Dataset

from cluster.manifest import fingerprint_of
from cluster.storage import AssetStore, Recipe
from flows.graph import Specs
from flows.staleness import Staleness


class AssetIO(dg.IOManager):
    """Connects the store, which knows where assets are, with the staleness, which knows what they are made from."""

    def __init__(
        self,
        store: AssetStore,
        staleness: Staleness,
        specs: Specs,
        made_again: Collection[str] = frozenset(),
        before_making: Callable[[str], None] = lambda _: None,
    ) -> None:
        """Serve one run.

        Args:
            store: where assets are.
            staleness: what they are made from.
            specs: the assets.
            made_again: assets that are made even if they are not stale.
            before_making: called with the name of an asset that is about to be made.
        """
        self._store = store
        self._staleness = staleness
        self._specs = specs
        self._made_again = made_again
        self._before_making = before_making

    def handle_output(self, context: dg.OutputContext, obj: Recipe) -> None:
        """Carry out the recipe if the asset is stale, and report the asset's numbers to Dagster."""
        asset = context.asset_key.to_user_string()
        refresh = context.asset_partition_key if context.has_asset_partitions else None
        manifest = self._store.manifest(asset, refresh)
        made_from = self._staleness.describe(asset, refresh)
        if manifest is None or asset in self._made_again or manifest.fingerprint != fingerprint_of(made_from):
            self._before_making(asset)
            manifest = self._store.make(asset, refresh, obj, made_from)
        shown = manifest.model_dump(include={"rows", "outcomes", "metrics", "seconds", "fingerprint"})
        context.add_output_metadata({name: value for name, value in shown.items() if value})

    def load_input(self, context: dg.InputContext) -> Dataset | BaseModel | dict[str, Any]:
        """The asset's rows, lazily, or its value as the type that the reader's parameter names.

        An asset over all refreshes gets the rows of every refresh in the store, also of refreshes that are not
        partitions of this Dagster instance.
        """
        asset = context.asset_key.to_user_string()
        kind = context.dagster_type.typing_type
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            return self._store.value(asset, kind)
        if self._specs[asset].partitions_def is None:
            manifest = self._store.manifest(asset)
            return self._store.rows(asset, [None]) if manifest is None or manifest.value is None else manifest.value
        if self._specs[context.op_def.name].partitions_def is None:
            return self._store.rows(asset, self._store.refreshes(asset))
        return self._store.rows(asset, [context.asset_partition_key])
