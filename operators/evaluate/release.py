"""Decides whether a new student replaces the released one.

It must not be worse than the released student on the held-out rows that both were measured on, by a paired bootstrap
over the rows. It must not be worse than the best student so far by more than a bound, so that many small losses do not
add up. If answers were judged, it must win often enough, ties counted.
"""

from collections.abc import Iterator

from pydantic import Field

from operators.evaluate.held_out_set import version_of
from operators.evaluate.release_history import Decision, Pointer, ReleaseHistory
from operators.evaluate.results import BEST, RELEASED, Comparison, Evaluation, PairedChange, Release, Verdicts
from operators.stage import Operational, StageConfig

Check = tuple[bool, str]  # whether it passed, and what was compared, in words


class ReleaseConfig(StageConfig):
    """How much worse a new student may be, with which confidence, and how clearly it has to win."""

    max_loss_increase: float = Field(
        0.0,
        description="Largest allowed increase in held-out loss over the released student, in nats per token.",
    )
    min_confidence: float = Field(
        0.9,
        ge=0.5,
        le=0.99,
        description="Share of the resampled held-out sets (a bootstrap over rows) in which the new student has to stay "
        "within max_loss_increase; 0.5 compares only the measured loss.",
    )
    min_rows: int = Field(
        10, ge=1, description="Smallest number of scored held-out rows on which a student may be released."
    )
    max_drift: float = Field(
        0.02,
        ge=0,
        description="Largest allowed increase in held-out loss over the best student so far, in nats per token.",
    )
    min_win_margin: float = Field(
        0.0,
        ge=-1,
        le=1,
        description="Smallest allowed (wins - losses) / judged pairs, ties counted as pairs; -1 allows everything.",
    )
    keep_students: Operational[int] = Field(
        10,
        ge=0,
        description="Newest students that are kept besides the released one, the one before it and the best; after a "
        "decision the folders of older ones are deleted, their evaluations stay. 0 keeps all.",
    )
    retrain_after_rows: Operational[int] = Field(
        0,
        ge=0,
        description="Number of new recycled rows from which a student is trained again; until then the rows are "
        "published but not trained on. With 0 here and a share of 0, any new row suffices.",
    )
    retrain_after_share: Operational[float] = Field(
        0.0,
        ge=0,
        description="The same as a share of the rows that the student was trained on; with both keys, either suffices.",
    )


def release(evaluation: Evaluation, version: str, history: ReleaseHistory, config: ReleaseConfig) -> Release:
    """Release a student or refuse it; the history records both.

    If no student is released yet, the new one is compared with the base model. A second call for a released version
    changes nothing, and a version that a person rolled back is not released again.

    Args:
        evaluation: of the student.
        version: the student's folder name under students/.
        history: of the storage.
        config: the bounds.

    Raises:
        ValueError: the pointer or the history cannot be read.
    """
    current = history.current()
    if current and current.version == version:
        return Release(
            released=True, version=version, previous=current.previous, reasons=(f"{version} is released already",)
        )
    checks = list(_checks(evaluation, version, current, history, config))
    passed, reasons = all(good for good, _ in checks), tuple(reason for _, reason in checks)
    history.record("released" if passed else "refused", version, evaluation, reasons, version_of(evaluation.rows))
    return Release(released=passed, version=version, previous=current.version if current else None, reasons=reasons)


def _checks(
    evaluation: Evaluation, version: str, current: Pointer | None, history: ReleaseHistory, config: ReleaseConfig
) -> Iterator[Check]:
    if history.is_rolled_back(version):
        yield False, f"a person rolled {version} back; `rollback {version}` releases it again"
    loss = evaluation.held_out_loss
    yield _check_rows(loss.num_rows, config)
    if loss.base is None or loss.student is None:
        yield False, "held-out loss: there is none to compare"
    else:
        against = _rival(evaluation, RELEASED, current.version if current else None)
        if current is None:
            yield _check_loss(loss.change, "the base model", config)
        elif against is not None and against.change.num_rows:
            yield _check_rows(against.change.num_rows, config, f", those that released {current.version} has too")
            yield _check_loss(against.change, f"released {current.version}", config)
        else:
            differing = against.measured_with if against is not None else ""
            yield _check_recorded(loss.base, loss.student, current, config, differing)
        best = history.best()
        if best is not None and best.version != version:
            yield _check_drift(_rival(evaluation, BEST, best.version), best, loss.student - loss.base, config)
    yield _check_wins(evaluation.judge, evaluation.judge.unparsed if evaluation.judge else 0, "the base model", config)
    rival = _rival(evaluation, RELEASED, current.version if current else None)
    if rival is not None and rival.judge is not None:
        yield _check_wins(rival.judge, 0, f"released {rival.version}", config)
    elif rival is not None and rival.measured_with:
        yield True, f"answers were not judged against released {rival.version}, measured with {rival.measured_with}"


def _rival(evaluation: Evaluation, role: str, version: str | None) -> Comparison | None:
    """The comparison with this version in this role, if the evaluation has one."""
    return next((one for one in evaluation.rivals if (one.role, one.version) == (role, version)), None)


def _check_rows(num_rows: int, config: ReleaseConfig, which: str = "") -> Check:
    good = num_rows >= config.min_rows
    judged = "enough" if good else "too few"
    return good, f"{num_rows} scored held-out rows{which}: {judged} (release.min_rows={config.min_rows})"


def _check_loss(change: PairedChange, against: str, config: ReleaseConfig) -> Check:
    worst, estimate = change.at(config.min_confidence), change.estimate
    if worst is None or estimate is None:
        return False, f"held-out loss against {against}: there is none to compare"
    measured = estimate if config.min_confidence == 0.5 else max(worst, estimate)
    good = measured <= config.max_loss_increase
    sure = f", {worst:+.4f} at release.min_confidence={config.min_confidence:g}" if config.min_confidence > 0.5 else ""
    return good, (
        f"held-out loss {estimate:+.4f} nats per token against {against} on {change.num_rows} rows{sure}: "
        f"{'not worse' if good else 'worse'} (release.max_loss_increase={config.max_loss_increase:g})"
    )


def _check_recorded(base: float, student: float, current: Pointer, config: ReleaseConfig, differing: str) -> Check:
    """Compare with the recorded loss if both have no measured row in common: gains over the base models count.

    `differing` are the keys with which the released student was measured, if they are others.
    """
    why = f" with {differing}" if differing else ""
    recorded = current.held_out_loss
    limit = (recorded.student or 0.0) + (base - (recorded.base or 0.0))
    good = student <= limit + config.max_loss_increase
    return good, (
        f"held-out loss {student:.4f} against {limit:.4f} of released {current.version}, as recorded{why}: "
        f"{'not worse' if good else 'worse'} (release.max_loss_increase={config.max_loss_increase:g})"
    )


def _check_drift(measured: Comparison | None, best: Decision, distance: float, config: ReleaseConfig) -> Check:
    """Compare with the best student so far: on common rows, or if there are too few, by the distances from the bases.

    `distance` is the new student's loss less its base model's.
    """
    loss, change, how = best.held_out_loss, None, ""
    if measured is not None and measured.change.num_rows >= config.min_rows:
        change = measured.change.estimate
    elif loss.base is not None and loss.student is not None:
        change, how = distance - (loss.student - loss.base), ", as recorded"
        how += f" with {measured.measured_with}" if measured is not None and measured.measured_with else ""
    if change is None:
        return False, f"held-out loss against {best.version}, the best so far: it cannot be compared"
    good = round(change, 9) <= config.max_drift
    return good, (
        f"held-out loss {change:+.4f} nats per token against {best.version}, the best so far{how}: "
        f"{'within' if good else 'beyond'} release.max_drift={config.max_drift:g}"
    )


def _check_wins(judge: Verdicts | None, unparsed: int, against: str, config: ReleaseConfig) -> Check:
    if judge is None:
        return True, "answers were not judged"
    if judge.win_margin is None:
        good = config.min_win_margin <= -1
        return good, f"judged wins against {against}: none of {unparsed} verdicts could be read"
    good = judge.win_margin >= config.min_win_margin
    return good, (
        f"judged {judge.wins} wins, {judge.ties} ties, {judge.losses} losses against {against}: "
        f"margin {judge.win_margin:+.3f} {'meets' if good else 'misses'} "
        f"release.min_win_margin={config.min_win_margin:g}"
    )
