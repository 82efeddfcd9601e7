"""What every stage shares: a frozen configuration and a check of the columns that it is handed."""

from collections.abc import Collection
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict


class StageConfig(BaseModel):
    """Base of every stage's configuration: immutable, and a misspelt key is an error, never a default."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=False)

    # Fields that say where or how fast the stage runs, never what it produces.
    OPERATIONAL: ClassVar[frozenset[str]] = frozenset()

    def identity(self) -> dict[str, Any]:
        """What determines the stage's output; a change in an operational field leaves finished work valid."""
        return self.model_dump(mode="json", exclude=set(self.OPERATIONAL))


def require_columns(stage: str, wanted: Collection[str], found: Collection[str]) -> None:
    """Refuse a data set that lacks a column which `stage` reads.

    Raises:
        ValueError: naming the stage, the missing columns and the columns that are there.
    """
    missing = sorted(set(wanted) - set(found))
    if missing:
        raise ValueError(
            f"{stage}: columns {', '.join(missing)} are missing; the input has {', '.join(sorted(found))}; "
            "materialise the stage before it again"
        )
