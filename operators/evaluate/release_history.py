"""Which student is released, and all decisions so far: a pointer, and a history that only grows.

    <storage>/released.json                the pointer: which student is released now
    <storage>/releases/000001.json ...     one file per decision, with the evaluation behind it; never changed

A decision is recorded before the pointer moves; if the pointer is gone, the last decision that moved it counts. Readers
of the pointer see the old student or the new one, never a part of a file: locally it is written beside and renamed over
the old one, and on an object store a PUT is atomic. Both kinds of files hold a checksum of their content.
"""

import datetime
import re
from typing import Any, Literal, TypeVar

from pyarrow import fs
from pydantic import ValidationError

from operators.evaluate.results import Comparison, Evaluation, HeldOutLoss, Judgement, Result
from operators.files.atomic import open_filesystem, put_file
from operators.files.copies import exists
from operators.files.seals import sealed, unsealed

POINTER, HISTORY, EVALUATIONS = "released.json", "releases", "evaluations"
_NUMBERED = re.compile(r"(\d{6,})\.json")
Record = TypeVar("Record", bound=Result)
Event = Literal["released", "refused", "rolled_back"]


class Pointer(Result):
    """The released student.

    Attributes:
        version: its folder name under students/.
        previous: the version that was released before it.
        released_at: ISO 8601, UTC.
        held_out_loss: of its evaluation.
        win_margin: (wins - losses) / pairs against its base model; None if nothing was judged.
    """

    version: str
    previous: str | None = None
    released_at: str = ""
    held_out_loss: HeldOutLoss
    win_margin: float | None = None


class Decision(Result):
    """One line of the history; its evaluation is kept without the samples.

    Attributes:
        number: from 1, in the order of the decisions.
        event: "released", "refused", or "rolled_back": a person released an earlier student again.
        version: the student that the decision is about.
        previous: the version that was released before the decision.
        at: ISO 8601, UTC.
        reasons: in words.
        held_out_loss: of the evaluation.
        judge: of the evaluation.
        rivals: of the evaluation.
        rows: file with what was measured of every held-out row, relative to the storage; storages written before
            2026-11-28 have absolute paths (`ReleaseHistory.rows_of` reads both).
        held_out: version of the held-out set, a hash over the ids of its rows; "" if unknown.
    """

    number: int
    event: Event
    version: str
    previous: str | None
    at: str
    reasons: tuple[str, ...]
    held_out_loss: HeldOutLoss
    judge: Judgement | None = None
    rivals: tuple[Comparison, ...] = ()
    rows: str = ""
    held_out: str = ""


class ReleaseHistory:
    """The releases of one storage; only the holder of the storage's lease may write."""

    def __init__(self, storage: str) -> None:
        """Open the history under an absolute path or a URI, which need not exist."""
        self._storage = storage
        self._filesystem, self._root = open_filesystem(storage)

    def current(self) -> Pointer | None:
        """The released student; None if none ever was.

        Raises:
            ValueError: the pointer file holds no release record.
        """
        path = f"{self._root}/{POINTER}"
        if self._filesystem.get_file_info(path).type == fs.FileType.NotFound:
            moved = [decision for decision in self.decisions() if decision.event != "refused"]
            return _pointer_to(moved[-1]) if moved else None
        found = _checked(Pointer, self._read(path), f"{self._storage}/{POINTER}")
        if found.held_out_loss.base is None or found.held_out_loss.student is None:
            raise ValueError(f"release: {self._storage}/{POINTER} holds no release record: a loss is missing")
        return found

    def decisions(self) -> list[Decision]:
        """All decisions, the oldest first.

        Raises:
            ValueError: a file of the history holds no decision.
        """
        selector = fs.FileSelector(f"{self._root}/{HISTORY}", allow_not_found=True)
        names = sorted(info.base_name for info in self._filesystem.get_file_info(selector))
        paths = [f"{self._root}/{HISTORY}/{name}" for name in names if _NUMBERED.fullmatch(name)]
        return [_checked(Decision, self._read(path), path) for path in paths]

    def record(
        self,
        event: Event,
        version: str,
        evaluation: Evaluation | Decision,
        reasons: tuple[str, ...],
        held_out: str = "",
    ) -> Decision:
        """Add a decision to the history and, unless it is a refusal, move the pointer to its version.

        `held_out` is the version of the held-out set that the evaluation was made on.
        """
        current, earlier = self.current(), self.decisions()
        decision = Decision(
            number=earlier[-1].number + 1 if earlier else 1,
            event=event,
            version=version,
            previous=current.version if current else None,
            at=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            reasons=reasons,
            held_out_loss=evaluation.held_out_loss,
            judge=evaluation.judge,
            rivals=evaluation.rivals,
            rows=evaluation.rows.removeprefix(f"{self._storage}/"),
            held_out=held_out,
        )
        put_file(f"{self._storage}/{HISTORY}/{decision.number:06}.json", sealed(decision))
        if event != "refused":
            put_file(f"{self._storage}/{POINTER}", sealed(_pointer_to(decision)))
        return decision

    def rows_of(self, decision: Decision) -> str:
        """Path or URI of what was measured of every held-out row; "" if the decision names no file.

        The storage may have been moved since an older version recorded an absolute path: the file is looked for in the
        storage first.
        """
        rows = decision.rows
        if not rows.startswith("/") and "://" not in rows:
            return f"{self._storage}/{rows}" if rows else ""
        own = f"{self._storage}/{EVALUATIONS}/{rows.rpartition('/')[2]}"
        return own if exists(own) else rows

    def roll_back(self, version: str) -> Decision:
        """Make an earlier released student the released one again.

        The student that it replaces is not released again automatically (`is_rolled_back`).

        Raises:
            ValueError: the version was never released, or is the released one.
        """
        released = {decision.version: decision for decision in self.decisions() if decision.event != "refused"}
        current = self.current()
        if version not in released:
            known = ", ".join(released) or "none"
            raise ValueError(f"rollback: {version} was never released; released were: {known}")
        if current and current.version == version:
            raise ValueError(f"rollback: {version} is the released student already")
        replaced = current.version if current else "no student"
        earlier, reasons = released[version], (f"a person rolled back from {replaced}",)
        return self.record("rolled_back", version, earlier, reasons, earlier.held_out)

    def is_rolled_back(self, version: str) -> bool:
        """Whether a person rolled this version back and it was not released again since."""
        return version in _taken_back(self.decisions())

    def best(self) -> Decision | None:
        """The released student whose loss is farthest below its base model's, without those that were rolled back."""
        decisions = self.decisions()
        taken_back = _taken_back(decisions)
        released = (one for one in decisions if one.event != "refused" and one.version not in taken_back)
        return min(released, key=_distance, default=None)

    def _read(self, path: str) -> Any:
        with self._filesystem.open_input_stream(path) as stream:
            try:
                return unsealed(stream.read())
            except ValueError:
                return None


def _pointer_to(decision: Decision) -> Pointer:
    return Pointer(
        version=decision.version,
        previous=decision.previous,
        released_at=decision.at,
        held_out_loss=decision.held_out_loss,
        win_margin=decision.judge.win_margin if decision.judge else None,
    )


def _taken_back(decisions: list[Decision]) -> set[str]:
    versions: set[str] = set()
    for decision in decisions:
        if decision.event == "rolled_back" and decision.previous:
            versions.add(decision.previous)
        if decision.event != "refused":
            versions.discard(decision.version)
    return versions


def _distance(decision: Decision) -> float:
    loss = decision.held_out_loss
    return (loss.student or 0.0) - (loss.base or 0.0)


def _checked(kind: type[Record], record: Any, path: str) -> Record:
    try:
        return kind.model_validate(record)
    except ValidationError as error:
        place = ".".join(map(str, error.errors()[0]["loc"])) or "the file"
        cure = (
            "restore it, or remove it: the last decision in releases/ then counts" if kind is Pointer else "restore it"
        )
        raise ValueError(f"release: {path} holds no release record ({place}); {cure}") from None
