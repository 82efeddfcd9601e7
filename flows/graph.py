"""The names of the assets, and the graph as one value for the code that runs or serves it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import dagster as dg

RAW_INSTRUCTIONS = "raw_instructions"
HELD_OUT = "held_out"
INSTRUCTION_REFLECTIONS = "instruction_reflections"
SELECTED_INSTRUCTIONS = "selected_instructions"
RESPONSE_REFLECTIONS = "response_reflections"
RECYCLED_INSTRUCTIONS = "recycled_instructions"
# From the rows of a refresh to recycled ones. Each may ask the teacher: for reflections, or as the judge that selects.
STAGES = (INSTRUCTION_REFLECTIONS, SELECTED_INSTRUCTIONS, RESPONSE_REFLECTIONS, RECYCLED_INSTRUCTIONS)
PUBLISHED_DATASET = "published_dataset"
PACKED_SEQUENCES = "packed_sequences"
STUDENT = "student"
EVALUATION = "evaluation"
RELEASE = "release"
REPORT = "report"

# Keys of asset metadata: the sections of the configuration that the asset depends on; and a flag that a refresh without
# rows to train on or to evaluate on does not make it stale.
CONFIG_KEYS, ONLY_ROWS = "config", "only_rows"
PARTITION_TAG = "dagster/partition"
Specs = Mapping[str, dg.AssetSpec]


@dataclass(frozen=True)
class Graph:
    """All assets in the order of the graph, their checks, and the partitions, one per refresh."""

    assets: Sequence[dg.AssetsDefinition]
    checks: Sequence[dg.AssetChecksDefinition]
    refreshes: dg.DynamicPartitionsDefinition

    @cached_property
    def specs(self) -> Specs:
        """Name of an asset -> Dagster's specification of it."""
        return {spec.key.to_user_string(): spec for asset in self.assets for spec in asset.specs}

    def has_refreshes(self, names: Sequence[str]) -> bool:
        """Whether one of the named assets (of all assets if none is named) is made once per refresh."""
        return any(self.specs[name].partitions_def is not None for name in names or self.specs)
