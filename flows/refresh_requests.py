"""Refreshes that the daemon has asked for and that are not finished: one small file each, under `refreshes/`.

A request holds the names and identities of its files, so that no other refresh takes them while it waits for its next
attempt. A request that failed too often is *given up*: it stays, with the reason, until a person retries it.
"""

from collections.abc import Iterator, Sequence
from typing import Annotated, Any

from pyarrow import fs
from pydantic import AfterValidator, BaseModel, ConfigDict

from cluster.files import StorageError
from cluster.refresh_key import require_refresh_key
from operators.files.atomic import open_filesystem, put_file
from operators.files.seals import sealed, unsealed

REQUESTS = "refreshes"
_SUFFIX = ".json"


class GivenUp(BaseModel):
    """Why a refresh is not tried again.

    Attributes:
        at: ISO 8601, UTC.
        attempts: number of failed runs.
        reason: why the last one failed, in one line.
        runs: ids of these runs.
        alerted: the alert was delivered, or nothing is configured to deliver it.
        alert_errors: why it could not be delivered.
    """

    model_config = ConfigDict(frozen=True)

    at: str
    attempts: int
    reason: str
    runs: tuple[str, ...] = ()
    alerted: bool = False
    alert_errors: tuple[str, ...] = ()


class Request(BaseModel):
    """One refresh that was asked for.

    Attributes:
        key: of the refresh.
        files: name and identity of each source file that it will take.
        forgiven: ids of runs that do not count as attempts: they ended before a person asked for a retry.
        given_up: None as long as it is tried.
    """

    model_config = ConfigDict(frozen=True)

    key: Annotated[str, AfterValidator(require_refresh_key)]
    files: tuple[tuple[str, str], ...] = ()
    forgiven: tuple[str, ...] = ()
    given_up: GivenUp | None = None


class Requests:
    """The requests of one storage."""

    def __init__(self, storage: str) -> None:
        """Open the folder under an absolute path or a URI, which need not exist."""
        self._folder = f"{storage}/{REQUESTS}"

    def all(self) -> list[Request]:
        """Every request, sorted by key. Damaged files are left out, and `damaged` names them."""
        return [found for found in self._each() if isinstance(found, Request)]

    def damaged(self) -> list[str]:
        """One line for each file that holds no request, with the cure."""
        return [str(found) for found in self._each() if isinstance(found, StorageError)]

    def _each(self) -> Iterator[Request | StorageError]:
        filesystem, root = open_filesystem(self._folder)
        found = filesystem.get_file_info(fs.FileSelector(root, allow_not_found=True))
        for name in sorted(info.base_name for info in found if info.base_name.endswith(_SUFFIX)):
            if name.startswith("."):
                continue
            try:
                request = self._read(filesystem, f"{root}/{name}")
            except StorageError as error:
                yield error
                continue
            if request is not None:
                yield request

    def get(self, key: str) -> Request | None:
        """The request for a refresh; None if there is none.

        Raises:
            StorageError: its file holds no request.
        """
        filesystem, root = open_filesystem(self._folder)
        path = f"{root}/{key}{_SUFFIX}"
        if filesystem.get_file_info(path).type != fs.FileType.File:
            return None
        return self._read(filesystem, path)

    def put(self, request: Request) -> Request:
        """Store a request; it replaces the one for the same refresh. Returns it."""
        put_file(f"{self._folder}/{request.key}{_SUFFIX}", sealed(request))
        return request

    def remove(self, key: str) -> None:
        """Forget the request for a refresh, if there is one."""
        filesystem, root = open_filesystem(self._folder)
        path = f"{root}/{key}{_SUFFIX}"
        if filesystem.get_file_info(path).type == fs.FileType.File:
            filesystem.delete_file(path)

    def _read(self, filesystem: Any, path: str) -> Request | None:
        try:
            with filesystem.open_input_stream(path) as stream:
                request = Request.model_validate(unsealed(stream.read()))
            if f"{request.key}{_SUFFIX}" != path.rpartition("/")[2]:
                raise ValueError(request.key)
            return request
        except FileNotFoundError:  # finished since the folder was listed
            return None
        except ValueError:  # ValidationError is a ValueError
            raise StorageError(
                f"refreshes: {path} holds no request; delete it, and its files are asked for again"
            ) from None


def named_by(requests: Sequence[Request]) -> set[tuple[str, str]]:
    """Name and identity of every file of these requests."""
    return {(name, identity) for request in requests for name, identity in request.files}
