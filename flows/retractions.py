"""Source files that a person retracted: `retracted.json`. No refresh takes them again or keeps their rows."""

from collections.abc import Collection
from dataclasses import dataclass

from pyarrow import fs
from pydantic import BaseModel, ConfigDict

from cluster.files import StorageError
from operators.files.atomic import open_filesystem, put_file
from operators.files.seals import sealed, unsealed

RETRACTED = "retracted.json"
Version = tuple[str, str]  # name of a file below the source, and the identity of its content


class _Kept(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    files: tuple[Version, ...]


@dataclass(frozen=True)
class Retractions:
    """The retracted files of one storage; only the holder of its lease may write."""

    storage: str

    def all(self) -> frozenset[Version]:
        """Every retracted version of a file.

        Raises:
            StorageError: the file holds no list.
        """
        path = f"{self.storage}/{RETRACTED}"
        filesystem, inside = open_filesystem(path)
        if filesystem.get_file_info(inside).type != fs.FileType.File:
            return frozenset()
        try:
            with filesystem.open_input_stream(inside) as stream:
                return frozenset(_Kept.model_validate(unsealed(stream.read())).files)
        except (OSError, ValueError):  # ValidationError is a ValueError
            raise StorageError(f"retracted files: {path} cannot be read; restore it from a backup") from None

    def add(self, versions: Collection[Version]) -> None:
        """Add versions to the retracted ones."""
        kept = _Kept(files=tuple(sorted({*self.all(), *versions})))
        put_file(f"{self.storage}/{RETRACTED}", sealed(kept))


def versions_to_retract(name: str, taken: Collection[Version], there: Collection[Version]) -> list[Version]:
    """The versions of a file that `--retract` retracts.

    If the file was changed after a refresh took it, these are the old versions, and the current one stays; otherwise it
    is the current version.

    Args:
        name: of the file, below the source.
        taken: versions that refreshes hold and that are not retracted yet.
        there: current versions of the files of the source.

    Raises:
        ValueError: no refresh holds the file.
    """
    held = sorted({version for version in taken if version[0] == name})
    if not held:
        names = sorted({version[0] for version in taken})
        known = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "") if names else "none"
        raise ValueError(f"--retract: {name}: no refresh holds rows of this file; files with rows: {known}")
    return [version for version in held if version not in set(there)] or held
