"""Trains the student on packs: Ray Train places and restarts the workers, and DeepSpeed shards the student.

`folder` has metrics.jsonl from the first step, checkpoints/ during training, and manifest.json once the student is
complete. Only the manifest says that a run is finished; Ray Train's own state is not used for this. `folder` may be in
a bucket: see `operators.train.bucket`.
"""

import json
import time
import uuid
from pathlib import Path
from typing import Any

from ray.data import Dataset, SaveMode
from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig, TrainingFailedError
from ray.train.torch import TorchTrainer

from operators import columns
from operators.files.atomic import open_filesystem, put_file
from operators.files.copies import delete, files_below, read_text
from operators.files.places import in_bucket
from operators.progress import report_progress
from operators.stage import require_columns
from operators.student.config import template_digest, templated
from operators.train.checkpoint import require_continuable
from operators.train.config import TrainConfig
from operators.train.job import CHECKPOINTS, EXPORTED, FAILED, PACKS, RAY_TRAIN, TrainJob, run_worker
from operators.train.metrics import METRICS, lines_of
from operators.train.pack_order import PackIndex, index_of, read_index
from operators.train.rendezvous import RendezvousConfig
from operators.train.result import MANIFEST, TrainResult
from operators.train.stopping import stop_is_asked, stopping_cleanly

__all__ = ["MANIFEST", "TrainConfig", "TrainResult", "TrainingStoppedError", "train"]

_BEGAN = "began.json"
RESIZE_EVERY_S = 600.0  # a node that came is used after at most this time; the steps since the last checkpoint are lost


class TrainingStoppedError(RuntimeError):
    """Training ended with an error that would repeat; the message is shown to the user."""


def train(packs: Dataset, config: TrainConfig, student: str, folder: str, chat_template: str = "") -> TrainResult:
    """Fine-tune the student and write it into `folder`.

    If the folder holds a finished student of the same packs, base model and configuration, nothing is trained. An
    unfinished training continues at its last good checkpoint, also after the driver itself was killed.

    Columns in: PACKS; rows whose outcome is not "packed" are skipped.

    Args:
        packs: from any storage; they are copied into `folder` during training.
        config: of the training, with the number of workers.
        student: folder or hub id of the base model.
        folder: gets the Hugging Face folder; a path that all workers share, or `s3://bucket/prefix`.
        chat_template: with which the packs were made, if it is not the student's own; the new student gets it.

    Returns:
        The content of the student's manifest.

    Raises:
        ValueError: there is no pack, or a row is in two packs; the folder holds a student of another run, or a
            checkpoint of another run or ZeRO stage.
        TrainingStoppedError: the loss is not finite, the model does not fit into memory, the student cannot be written,
            or SIGTERM stopped the training.
        TrainingFailedError (of Ray Train): the workers failed more than `max_failures` times.
    """
    require_columns("train", columns.PACKS.names, packs.columns())
    home = folder if in_bucket(folder) else str(Path(folder).resolve())
    files = _shared_files(packs, home)
    index = index_of(packs) if in_bucket(home) else read_index(files)
    identity = config.run_identity(index.digest, templated(student, chat_template))
    job = TrainJob(config, student, home, files, index.digest, identity, _began(home), chat_template=chat_template)
    finished = _finished(home, job.identity)
    if finished is not None:
        return finished
    started = time.monotonic()
    if _state(home, EXPORTED).get("identity") != job.identity:
        if not in_bucket(home):  # for a bucket the workers check this, because they have the shards
            require_continuable(Path(home) / CHECKPOINTS, job.spec)
        _fit(job, index)
    result = _result(job, index, time.monotonic() - started)
    put_file(f"{home}/{MANIFEST}", json.dumps(result.model_dump(mode="json"), indent=1))
    delete(f"{home}/{CHECKPOINTS}")
    return result


def _shared_files(packs: Dataset, home: str) -> list[str]:
    """Copy the packs to a place next to the student, where every worker can map or fetch them.

    `Dataset.input_files()` would avoid the copy, but it is empty for Ray 2.58's Parquet reader.
    """
    copy = f"{home}/{CHECKPOINTS}/{PACKS}"
    filesystem, inside = open_filesystem(copy)
    packs.write_parquet(inside, filesystem=filesystem, mode=SaveMode.OVERWRITE)
    return sorted(f"{copy}/{name}" for name in files_below(copy) if name.endswith(".parquet"))


def _began(home: str) -> float:
    """Unix time of the first attempt, also if this is a later one."""
    if not _state(home, _BEGAN):
        put_file(f"{home}/{CHECKPOINTS}/{_BEGAN}", json.dumps({"began": time.time()}))
    return float(_state(home, _BEGAN)["began"])


def _finished(home: str, identity: str) -> TrainResult | None:
    text = read_text(f"{home}/{MANIFEST}")
    if text is None:
        return None
    result = TrainResult.model_validate_json(text)
    if result.identity != identity:
        raise ValueError(
            f"train: {home} holds a finished student of other packs or another configuration "
            f"({result.identity} against {identity}); train into a folder of its own"
        )
    delete(f"{home}/{CHECKPOINTS}")
    return result


def _state(home: str, name: str) -> dict[str, Any]:
    """The content of a JSON file of the training; empty if there is no such file."""
    return dict(json.loads(read_text(f"{home}/{CHECKPOINTS}/{name}") or "{}"))


def _fit(job: TrainJob, index: PackIndex) -> None:
    config, home = job.config, job.folder
    delete(f"{home}/{CHECKPOINTS}/{FAILED}")  # a new run is a new attempt
    filesystem, inside = open_filesystem(f"{home}/{CHECKPOINTS}/{RAY_TRAIN}")
    report_progress("train", total=config.total_steps(index.order(config).steps_per_epoch), note="loading")
    trainer = TorchTrainer(
        run_worker,
        train_loop_config={"job": job},
        torch_config=RendezvousConfig(backend="nccl" if config.gpus_per_worker else "gloo"),
        scaling_config=scaling_of(config),
        run_config=RunConfig(  # type: ignore[call-arg]  # mypy sees the class of Ray Train v1
            # A new name each time: if Ray Train knows the name, it takes the run for finished and trains nothing.
            name=uuid.uuid4().hex,
            storage_path=inside,
            storage_filesystem=filesystem,
            failure_config=FailureConfig(max_failures=config.max_failures),
            logging_config=LoggingConfig(log_level="ERROR"),
        ),
    )
    try:
        with stopping_cleanly(home):
            trainer.fit()
    except TrainingFailedError:
        if not _state(home, FAILED):
            raise
    if failure := _state(home, FAILED):
        raise TrainingStoppedError(failure["error"])
    if stop_is_asked(home):  # the signal itself may not have ended the driver
        raise TrainingStoppedError("train: stopped by SIGTERM after a checkpoint; run the same command to go on")


def scaling_of(config: TrainConfig) -> ScalingConfig:
    """The workers as one placement group: Ray places all of them or none, so that no two runs wait for each other.

    An elastic training has the largest group that the nodes allow, and begins anew at its last checkpoint when a node
    was lost or came.
    """
    resources = {"CPU": config.cpus_per_worker, **config.custom_resources}
    if config.gpus_per_worker:
        resources["GPU"] = config.gpus_per_worker
    elastic = 0 < config.min_workers < config.num_workers
    workers: Any = (config.min_workers, config.num_workers) if elastic else config.num_workers
    return ScalingConfig(  # type: ignore[call-arg]  # mypy sees the class of Ray Train v1
        num_workers=workers,
        use_gpu=config.gpus_per_worker > 0,
        resources_per_worker=resources,
        elastic_resize_monitor_interval_s=RESIZE_EVERY_S,
    )


def _result(job: TrainJob, index: PackIndex, wall_seconds: float) -> TrainResult:
    config, home = job.config, job.folder
    lines, exported = lines_of(read_text(f"{home}/{METRICS}") or ""), _state(home, EXPORTED)
    assert exported, f"train: workers ended without {EXPORTED} in {home}"
    losses = [line["loss"] for line in lines]
    norms = [line["neft_l2"] for line in lines if line["neft_l2"] is not None]
    evaluated = [line for line in lines if line["validation_loss"] is not None]
    shares = [line["mfu"] for line in lines if line["mfu"] is not None]
    seconds, tokens = sum(line["seconds"] for line in lines), sum(line["tokens"] for line in lines)
    return TrainResult(
        **exported,
        folder=home,
        student=job.student,
        packs=index.num_packs,
        packs_digest=index.digest,
        steps=len(lines),
        tokens=tokens,
        supervised_tokens=sum(line["supervised_tokens"] for line in lines),
        examples=sum(line["examples"] for line in lines),
        seconds=seconds,
        wall_seconds=wall_seconds,
        tokens_per_second=tokens / seconds,
        first_loss=losses[0],
        last_loss=losses[-1],
        losses=losses,
        grad_norms=[line["grad_norm"] for line in lines],
        neft_l2=sum(norms) / len(norms) if norms else None,
        validation_losses={line["step"] + 1: line["validation_loss"] for line in evaluated},
        mfu=sum(shares) / len(shares) if shares else None,
        goodput=lines[-1]["goodput"],
        neftune_alpha=config.neftune_alpha,
        chat_template=template_digest(job.chat_template),
        attention=config.attention,
        zero_stage=config.sharding,
        num_workers=len(exported["peak_rss_bytes"]),  # an elastic training may end with fewer
        precision=config.precision,
        config=config.model_dump(mode="json"),
    )
