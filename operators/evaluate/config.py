"""Configuration of the evaluation: what is compared, where the two models run, and why a row may have no loss."""

import hashlib
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, Self

from pydantic import Field, field_validator, model_validator

from operators.own_prompt import SHIPPED, PromptConfig
from operators.stage import Operational, StageConfig
from operators.student.encode import LossOn
from operators.student.pool import StudentPoolConfig

MAX_SAMPLES = 5000  # samples are held by the driver and shown in the report
OVER_LONG, NOT_FINITE = "over_max_tokens", "not_finite"


class HarnessConfig(StageConfig):
    """Tasks of lm-evaluation-harness on which base model, student and released student are measured."""

    tasks: tuple[str, ...] = Field(
        (),
        description="Names of tasks, groups or tags of lm-evaluation-harness (the package lm_eval), such as "
        "arc_easy; empty runs none.",
    )
    include_path: str = Field(
        "",
        description="Folder with further task files, on every node; the functions and templates in them are run as "
        "code, so name only a folder that you trust.",
    )
    num_fewshot: int | None = Field(
        None, ge=0, description="Number of examples in a prompt; null takes that of each task."
    )
    limit: int = Field(0, ge=0, description="Number of questions of a task that are asked; 0 asks all.")
    chat_template: bool = Field(False, description="Whether a prompt is written as a turn of the student's chat.")
    download: Operational[bool] = Field(
        False, description="Whether tasks may load data sets from the hub; else they must be files or in its cache."
    )
    batch_rows: Operational[int] = Field(
        8, ge=1, description="Number of questions that a model reads at once; limits the memory of the logits."
    )

    @field_validator("tasks")
    @classmethod
    def _are_names(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            if not re.fullmatch(r"[\w.+-]+", name) or name.endswith(".yaml"):
                raise ValueError(
                    f"{name!r} is not the name of a task; put its file into include_path and name the task"
                )
        return names

    @field_validator("include_path")
    @classmethod
    def _is_absolute(cls, folder: str) -> str:
        return str(Path(folder).expanduser().absolute()) if folder else ""

    @model_validator(mode="after")
    def _other_keys_need_tasks(self) -> Self:
        unused = sorted(name for name in self.model_fields_set if getattr(self, name) != _default(self, name))
        if not self.tasks and unused:
            raise ValueError(f"{', '.join(unused)} have no effect without tasks; name tasks, or leave them out")
        return self

    def identity(self) -> dict[str, Any]:
        """What determines the scores; the folder counts by its files, not by its place."""
        kept = super().identity()
        return kept | {"include_path": digest_of_folder(self.include_path) if self.include_path else ""}


def _default(config: StageConfig, name: str) -> Any:
    return type(config).model_fields[name].default


def digest_of_folder(folder: str) -> str:
    """A hash of the names and bytes of a folder's files, without hidden ones; that of no file if it cannot be read."""
    digest = hashlib.sha256()
    with suppress(OSError):
        for file in sorted(Path(folder).rglob("*")):
            inside = file.relative_to(folder)
            if file.is_file() and not any(part.startswith((".", "__pycache__")) for part in inside.parts):
                digest.update(f"{inside} {file.stat().st_size}\n".encode() + file.read_bytes())
    return digest.hexdigest()[:16]


class Training(Protocol):
    """The keys of a training that an evaluation follows, as in `operators.train.config.TrainConfig`."""

    @property
    def num_workers(self) -> int:
        """Number of workers."""

    @property
    def min_workers(self) -> int:
        """The least number of workers; 0: all."""

    @property
    def gpus_per_worker(self) -> float:
        """GPUs of a worker."""

    @property
    def cpus_per_worker(self) -> float:
        """Logical CPUs of a worker."""

    @property
    def threads_per_worker(self) -> int:
        """Torch threads of a worker; 0: as many as its CPUs."""

    @property
    def precision(self) -> str:
        """fp32 or bf16."""


class EvaluateConfig(StudentPoolConfig):
    """What is compared, and where the two models run."""

    num_samples: int = Field(
        32, ge=0, le=MAX_SAMPLES, description="Number of held-out rows that both models answer and the judge compares."
    )
    max_new_tokens: int = Field(256, ge=1, description="Longest sample answer in tokens.")
    repetition_penalty: float = Field(
        1.0, gt=0, description="Factor that lowers the score of a token that was used already; 1 changes nothing."
    )
    generate_rows: Operational[int] = Field(
        16, ge=1, description="Number of sample answers that one actor decodes at once."
    )
    judge: bool = Field(True, description="Whether the teacher compares the sample answers.")
    judge_critique: bool = Field(True, description="Whether the judge explains itself before it scores.")
    judge_max_tokens: int = Field(256, ge=16, description="Longest verdict of the judge in tokens.")
    judge_prompt: PromptConfig = Field(SHIPPED, description="Own words for the judge.")
    max_tokens: int = Field(
        2048,
        ge=2,
        description="Length of the longest sequence that is scored, in tokens; the report counts longer ones. At least "
        "pack.max_tokens unless it is set.",
    )
    precision: Literal["fp32", "bf16"] = Field(
        "fp32", description="Number format of base model and student; as train.precision unless it is set."
    )
    actors: Operational[int] = Field(
        1,
        ge=1,
        description="Number of actors, each with a copy of a model; as many as the GPUs of the training allow unless "
        "it is set, one on CPUs.",
    )
    gpus_per_actor: Operational[float] = Field(
        0, ge=0, description="GPUs that an actor reserves, 0 for CPUs; as train.gpus_per_worker unless it is set."
    )
    cpus_per_actor: Operational[float] = Field(
        1, gt=0, description="Logical CPUs that an actor reserves; as train.cpus_per_worker unless it is set."
    )
    threads: Operational[int] = Field(
        1,
        ge=1,
        description="Number of torch threads of an actor on CPUs; as those of a worker of the training unless it is "
        "set.",
    )
    loss_on: LossOn = Field(
        "last",
        description="The assistant's turns of a dialogue whose loss is measured: last (with the one that would be "
        "reflected on), recycled (only that one), or all; as pack.loss_on unless it is set.",
    )
    harness: HarnessConfig = Field(
        HarnessConfig(), description="Tasks of lm-evaluation-harness that the models are measured on."
    )

    def identity(self) -> dict[str, Any]:
        """Leave out later sections unless they are configured, so that older evaluations stay valid."""
        later = {"harness": HarnessConfig().identity(), "judge_prompt": SHIPPED.identity()}
        kept = super().identity() | {"harness": self.harness.identity()}
        return {key: chosen for key, chosen in kept.items() if key not in later or chosen != later[key]}

    def following(self, train: Training, longest_pack: int, loss_on: LossOn) -> Self:
        """Fill in what is not configured from the training: resources, number format, loss, and length of its packs.

        To evaluate a model that is trained on GPUs would take days on one CPU thread, and short rows say little about a
        model that is trained on long ones.

        Args:
            train: how the student was trained.
            longest_pack: `pack.max_tokens`.
            loss_on: `pack.loss_on`.
        """
        gpus = self.gpus_per_actor if "gpus_per_actor" in self.model_fields_set else train.gpus_per_worker
        workers = train.min_workers or train.num_workers  # an elastic training may have lost the others
        fitting = int(workers * train.gpus_per_worker / gpus) if gpus else 1
        follows = {
            "actors": max(1, min(workers, fitting)),
            "gpus_per_actor": train.gpus_per_worker,
            "cpus_per_actor": train.cpus_per_worker,
            "threads": train.threads_per_worker or max(1, int(train.cpus_per_worker)),
            "precision": train.precision,
            "max_tokens": max(self.max_tokens, longest_pack),
            "loss_on": loss_on,
        }
        return self.model_copy(update={key: new for key, new in follows.items() if key not in self.model_fields_set})


@dataclass(frozen=True)
class TrainedAttention:
    """The attention with which a student was trained and is evaluated.

    Attributes:
        name: "hyper_attention", or any other name for exact attention.
        sizes: fields of `kernels.hyper_attention.HyperAttentionConfig`.
        layers: which layers use it; the others are exact.
    """

    name: str = "sdpa"
    sizes: dict[str, Any] = field(default_factory=dict)
    layers: str | Sequence[int] = "all"
