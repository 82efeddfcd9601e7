"""Which rows a training step learns from: `--step N`."""

import re
from typing import NamedTuple, TextIO

from flows.config import ConfigError
from flows.exit_codes import DONE
from flows.graph import PACKED_SEQUENCES, STUDENT
from flows.retention import STUDENTS
from flows.run import Run
from operators.files.copies import exists, read_text
from operators.train.config import TrainConfig
from operators.train.result import MANIFEST, TrainResult


class _Training(NamedTuple):
    """A training, in words, its configuration, and the steps that it took; None if it has not ended."""

    words: str
    config: TrainConfig
    steps: range | None = None


def print_step(run: Run, step: int, out: TextIO) -> int:
    """Print the ids of the rows that optimizer step `step` (from 0) learns from; returns 0.

    The training is that of this configuration's student if it has begun, else that of the last student. The packs must
    be those that the student was trained on. Before the first training, it is the one that this configuration will do.

    Raises:
        ConfigError: nothing is packed yet, the packs were made again since the training, or it has no such step.
    """
    if run.store.manifest(PACKED_SEQUENCES) is None:
        raise ConfigError(
            f"--step: {PACKED_SEQUENCES} is not made in {run.config.storage} yet; run without --step first"
        )
    from operators.train.pack_order import index_of  # here, because it imports torch, which takes seconds

    try:
        index = index_of(run.store.rows(PACKED_SEQUENCES, [None]))
        training = _training(run, index.digest)
        _require_taken(training, step)
        rows = index.rows_of_step(training.config, step)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"--step: {error}") from None
    epoch, trained = index.order(training.config).epoch(step), index.num_trained(training.config)
    out.write(f"{training.words}\n")
    out.write(f"step {step}, epoch {epoch}: {len(rows)} rows; each of the {trained} rows is in one step of an epoch\n")
    out.writelines(f"{row_id}\n" for row_id in rows)
    return DONE


def _training(run: Run, digest: str) -> _Training:
    """The training that is asked about, which had the packs of this digest.

    Raises:
        ConfigError: it had others.
    """
    from operators.train.metrics import METRICS  # here, because it imports torch, which takes seconds

    version = run.student_version()
    finished = read_text(run.path(STUDENTS, version, MANIFEST))
    if finished is None and exists(run.path(STUDENTS, version, METRICS)):
        return _Training(f"student {version}, whose training has not ended", run.config.train)
    made = run.store.manifest(STUDENT)
    if finished is not None:
        student = TrainResult.model_validate_json(finished).model_copy(update={"version": version})
    elif made is not None:
        student = TrainResult.model_validate(made.value)
    else:
        return _Training("no student is trained yet; this is what this configuration would do", run.config.train)
    if student.packs_digest != digest:
        raise ConfigError(
            f"--step: {PACKED_SEQUENCES} was made again since student {student.version} was trained, so the rows of "
            "its steps are not known any more; a run without --step trains a student on these packs"
        )
    # As it was then: an older configuration need not be valid any more.
    config = TrainConfig.model_construct(**student.config)
    first = re.search(r"step-(\d+)/?$", config.resume_from)
    begins = int(first[1]) if first else 0
    return _Training(f"student {student.version}", config, range(begins, begins + student.steps))


def _require_taken(training: _Training, step: int) -> None:
    """Refuse a step that a finished training did not take: it stopped early, or began at another run's checkpoint."""
    steps = training.steps
    if steps is None or step in steps:
        return
    before = f"; the steps before are those of {training.config.resume_from}" if 0 <= step < steps.start else ""
    raise ConfigError(
        f"--step: {step} is none of {training.words}, which took the steps {steps.start} to {steps.stop - 1}{before}"
    )
