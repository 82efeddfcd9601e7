"""The source files of each refresh: those that it takes, those that it was made from, and those that are gone.

Stored rows are the archive of files that are gone. So a refresh keeps its files, and its place in the order, as long as
its rows are stored: also while it is unfinished, because a check failed or somebody deleted its marker.
"""

from functools import cached_property

from cluster.manifest import Manifest
from cluster.storage import AssetStore
from flows.graph import RAW_INSTRUCTIONS
from flows.refresh_requests import Requests, named_by
from flows.retractions import Retractions, Version
from flows.source_versions import RefreshFile, source_files
from operators.columns import QUARANTINED
from operators.read.config import ReadConfig

TAKEN_OUT = "retracted"  # key of a description: the retracted files of the refresh


class TakenFiles:
    """Decides which refresh has which source file, given the raw instructions in the store."""

    def __init__(
        self,
        source: ReadConfig,
        store: AssetStore,
        settle_s: float = 0,
        requests: Requests | None = None,
        retractions: Retractions | None = None,
    ) -> None:
        """Files younger than `settle_s` seconds are ignored, and files of requests count as taken."""
        self._source = source
        self._store = store
        self._settle_s = settle_s
        self._requests = requests
        self._retractions = retractions

    def files_of(self, refresh: str | None) -> list[RefreshFile]:
        """The files of a refresh: those that it took before, and those that no other refresh has taken or requested.

        A refresh that was requested has exactly the files of its request.
        """
        requests = self._requests.all() if self._requests else []
        own = [request for request in requests if request.key == refresh]
        if own:
            allowed = (named_by(own) | set(self.taken(refresh))) - self._retracted
            return [file for file in self._readable if (file.name, file.identity) in allowed]
        taken = self._of_others(refresh) | named_by(requests) | self._retracted
        return [file for file in self._readable if (file.name, file.identity) not in taken]

    def taken(self, refresh: str | None) -> list[Version]:
        """Names and identities of the files whose rows a refresh holds; empty if it was never made."""
        held = self._held(refresh)
        if held is None:
            return []
        versions = _versions(held, "files")
        if self._is_finished(refresh):
            return versions
        others = self._of_others(refresh)  # of refreshes that were made while this one was unfinished
        return [version for version in versions if version not in others]

    def gone(self, refresh: str) -> list[str]:
        """Names of files from which the refresh was made and that no longer exist, or have another content.

        The stored rows of these files are kept; those of retracted files are not.
        """
        there = {(file.name, file.identity) for file in self.there()} | self._retracted
        return [version[0] for version in self.taken(refresh) if version not in there]

    def there(self) -> list[RefreshFile]:
        """The files of the source; empty if the source no longer exists."""
        try:
            return self._readable
        except (ValueError, OSError):
            return []

    def described(self, refresh: str | None) -> list[Version]:
        """Names and identities of a refresh's files: those that can be read, and those whose stored rows are kept.

        Raises:
            ValueError: the source has no file, and the refresh was never made.
            OSError: the source cannot be read, and the refresh was never made.
        """
        try:
            readable = self.files_of(refresh)
        except (ValueError, OSError):
            if not self.taken(refresh):
                raise
            readable = []
        kept = set(self.taken(refresh)) - self._retracted
        return sorted(kept | {(file.name, file.identity) for file in readable})

    def taken_out(self, refresh: str | None) -> list[Version]:
        """The retracted files that the refresh once held."""
        held = self._held(refresh)
        if held is None:
            return []
        return sorted({*_versions(held, "files"), *_versions(held, TAKEN_OUT)} & self._retracted)

    def earlier(self, refresh: str | None) -> list[str]:
        """Keys of the refreshes that were first made before this one; all others if it was never made."""
        made = self._store.refreshes(RAW_INSTRUCTIONS)
        if refresh in made:
            return made[: made.index(refresh)]
        held = None if refresh is None else self._store.held(RAW_INSTRUCTIONS, refresh)
        before = held.order if held else 0
        others = {key: self._store.manifest(RAW_INSTRUCTIONS, key) for key in made}
        return [key for key, other in others.items() if not before or (other and other.order < before)]

    def unreadable(self) -> list[str]:
        """Names of files that this process may not read; no refresh takes them as long as this is so."""
        try:
            return [file.name for file in self._all_files if not file.identity]
        except (ValueError, OSError):  # there is no source any more
            return []

    def _held(self, refresh: str | None) -> Manifest | None:
        """The record of the stored rows; None if no row is stored, or none of an unfinished refresh could be used."""
        held = None if refresh is None else self._store.held(RAW_INSTRUCTIONS, refresh)
        usable = held is not None and any(not outcome.startswith(QUARANTINED) for outcome in held.outcomes)
        return held if usable or self._is_finished(refresh) else None

    def _is_finished(self, refresh: str | None) -> bool:
        return self._store.manifest(RAW_INSTRUCTIONS, refresh) is not None

    def _of_others(self, refresh: str | None) -> set[Version]:
        """The files of all finished refreshes but this one."""
        keys = [key for key in self._store.refreshes(RAW_INSTRUCTIONS) if key != refresh]
        made = (self._store.manifest(RAW_INSTRUCTIONS, key) for key in keys)
        return {version for manifest in made if manifest for version in _versions(manifest, "files")}

    @cached_property
    def _retracted(self) -> frozenset[Version]:
        return self._retractions.all() if self._retractions else frozenset()

    @property
    def _readable(self) -> list[RefreshFile]:
        return [file for file in self._all_files if file.identity]

    @cached_property
    def _all_files(self) -> list[RefreshFile]:
        return source_files(self._source.path, self._settle_s, self._source.split)


def _versions(manifest: Manifest, key: str) -> list[Version]:
    return [(name, identity) for name, identity in manifest.made_from.get(key, [])]
