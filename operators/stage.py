"""What every stage shares: a frozen configuration and a check of its input's columns."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from operators.redact import without_credentials

Value = TypeVar("Value")
_OPERATIONAL = "operational"
# Marks a field that says where or how fast a stage runs, never what it produces:
# `actors: Operational[int] = Field(1, ...)`.
Operational = Annotated[Value, _OPERATIONAL]
_RAYS_OWN = ("CPU", "GPU", "memory", "object_store_memory")
_LEAST = 0.0001  # Ray counts in such units


def _custom(resources: dict[str, float]) -> dict[str, float]:
    for name, amount in resources.items():
        if name in _RAYS_OWN or not name:
            raise ValueError(f"{name!r} is not a custom resource; it has a key of its own")
        if amount < _LEAST:
            raise ValueError(f"{name}: {amount:g} is less than {_LEAST}, the least that Ray can reserve")
    return resources


CustomResources = Annotated[dict[str, float], AfterValidator(_custom), _OPERATIONAL]


def on_nodes_with(unit: str) -> Any:
    """The field of `custom_resources`, which chooses the nodes of a stage.

    Args:
        unit: what reserves them, such as "engine".
    """
    return Field(
        default={},
        description=f"Custom resources of Ray that each {unit} reserves, such as student_pool: 0.001; so it runs only "
        "on nodes that were started with them.",
    )


class StageConfig(BaseModel):
    """Base of every stage's configuration: immutable, and a misspelt key is an error, never a default."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=False)

    @classmethod
    def operational(cls) -> frozenset[str]:
        """Names of the fields that are declared `Operational`."""
        return frozenset(name for name, field in cls.model_fields.items() if _OPERATIONAL in field.metadata)

    def identity(self) -> dict[str, Any]:
        """The fields that determine the stage's output; a change in an operational field leaves finished work valid.

        Manifests keep this and it is published, so credentials are hidden.
        """
        kept: dict[str, Any] = without_credentials(self.model_dump(mode="json", exclude=set(self.operational())))
        return kept


@dataclass(frozen=True)
class Finding:
    """What a check found before the first teacher call.

    Attributes:
        key: of the configuration, such as `student.model`.
        text: one line: what is wrong, the value, the limit, and the cure.
        fatal: the run is refused; otherwise the finding is a warning.
    """

    key: str
    text: str
    fatal: bool = True

    def __str__(self) -> str:
        return f"{self.key}: {without_credentials(self.text)}"


def require_columns(stage: str, wanted: Collection[str], found: Collection[str]) -> None:
    """Refuse a data set that lacks a column which `stage` reads.

    Raises:
        ValueError: it names the stage, the missing columns and the columns that are there.
    """
    missing = sorted(set(wanted) - set(found))
    if missing:
        raise ValueError(
            f"{stage}: columns {', '.join(missing)} are missing; the input has {', '.join(sorted(found))}; "
            "materialise the stage before it again"
        )
