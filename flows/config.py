"""The configuration of a run: one YAML file with one frozen section per stage, checked before anything starts.

The environment holds only addresses and credentials; it never changes what a run computes. Every error names file, key,
value and limit.
"""

import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self, get_args

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic_core import ErrorDetails

from cluster.runtime import REPOSITORY
from flows.schedule_config import ScheduleConfig
from operators.evaluate.config import EvaluateConfig
from operators.evaluate.release import ReleaseConfig
from operators.files.places import require_endpoint
from operators.models import PACKAGE_PREFIX
from operators.publish.publish import PublishConfig
from operators.read.config import ReadConfig
from operators.read.drop_contaminated import DecontaminateConfig
from operators.read.drop_near_duplicates import DeduplicateConfig
from operators.read.own_steps import StepsConfig
from operators.redact import without_credentials
from operators.reflect.config import ReflectConfig
from operators.reflect.filter_rewrites import FilterConfig
from operators.report.report import ReportConfig
from operators.select.config import SelectConfig
from operators.select.ifd import ScoreConfig
from operators.stage import Operational, StageConfig
from operators.student.config import StudentConfig
from operators.teacher.budget import BudgetConfig
from operators.teacher.config import TeacherConfig
from operators.teacher.variants import REFLECTIONS, members_of, teacher_of
from operators.train.config import TrainConfig
from operators.train.pack import PackConfig

CONFIG_VARIABLE = "RECYCLE_CONFIG"  # the YAML file, for processes without a command line
OVERRIDES_VARIABLE = "RECYCLE_OVERRIDES"  # dotted overrides, quoted as in a shell


class ConfigError(ValueError):
    """The configuration cannot be used; the message is shown to the user, with one line per error."""


class RunConfig(StageConfig):
    """Everything that a run needs to know."""

    name: str = Field(pattern=r"^[A-Za-z0-9][\w.-]*$", description="Name of the run and of its report.")
    storage: str = Field(
        min_length=1,
        description="The place of assets, ledger, students and reports: a folder that all nodes share, or "
        "`s3://bucket/prefix`.",
    )
    storage_endpoint: Operational[str] = Field(
        "",
        description="Address of an S3-compatible store, http(s)://host:port, for every s3:// of the run; empty uses "
        "that of the environment (AWS_ENDPOINT_URL_S3), else Amazon's. Credentials come from the environment.",
    )
    storage_lost_after_seconds: Operational[float] = Field(
        60,
        ge=5,
        description="Time in seconds without a renewed lease after which another run may take over a storage in a "
        "bucket.",
    )
    allow_open_ray: Operational[bool] = Field(
        False,
        description="Run on a Ray cluster whose ports take commands from anyone who reaches them: it has no token and "
        "listens beyond 127.0.0.1. Only for a network that nobody else can reach.",
    )
    autoscaled: Operational[bool] = Field(
        False,
        description="The cluster adds nodes when a stage waits for them: too few nodes are a warning, not a refusal.",
    )
    source: ReadConfig
    deduplicate: DeduplicateConfig = DeduplicateConfig()
    decontaminate: DecontaminateConfig = DecontaminateConfig()
    steps: StepsConfig = StepsConfig()
    teacher: TeacherConfig
    budget: BudgetConfig = BudgetConfig()
    student: StudentConfig
    reflect: ReflectConfig = ReflectConfig()
    filter: FilterConfig = FilterConfig()
    score: ScoreConfig = ScoreConfig()
    select: SelectConfig = SelectConfig()
    publish: PublishConfig = PublishConfig()
    pack: PackConfig = PackConfig()
    train: TrainConfig = TrainConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    release: ReleaseConfig = ReleaseConfig()
    report: ReportConfig = ReportConfig()
    schedule: ScheduleConfig = ScheduleConfig()

    @field_validator("storage_endpoint")
    @classmethod
    def _endpoint_is_an_address(cls, value: str) -> str:
        return require_endpoint(value)

    @model_validator(mode="after")
    def _reply_fits_the_context(self) -> Self:
        longest = self.reflect.max_tokens
        for stage in REFLECTIONS:
            for member in members_of(teacher_of(self.teacher, stage)):
                teacher = member.teacher
                obeys = teacher.backend == "vllm" and teacher.max_tokens is None  # an endpoint has its own limit
                if obeys and longest >= teacher.max_model_len:
                    raise ValueError(
                        f"reflect.max_tokens: {longest} leaves no room for a prompt in teacher.max_model_len: "
                        f"{teacher.max_model_len} of {stage}; lower reflect.max_tokens or raise teacher.max_model_len"
                    )
        return self


def evaluate_config(config: RunConfig) -> EvaluateConfig:
    """The configuration of the evaluation, with values that are not set taken from the training and its packs."""
    return config.evaluate.following(config.train, config.pack.max_tokens, config.pack.loss_on)


def default_config() -> Path:
    """The YAML file to use if the command line names none."""
    return Path(os.environ.get(CONFIG_VARIABLE, "configs/demo.yaml"))


def config_of_environment() -> RunConfig:
    """The configuration of processes that Dagster starts, which do not get our command line.

    Raises:
        ConfigError: as for `load_config`.
    """
    overrides = shlex.split(os.environ.get(OVERRIDES_VARIABLE, ""))
    require_public(overrides)
    return load_config(default_config(), overrides)


def require_public(overrides: Sequence[str]) -> None:
    """Refuse overrides of the daemon with a credential: they are passed to its jobs, and Ray shows the jobs' settings.

    Raises:
        ConfigError: it names the key, not the value.
    """
    for override in overrides:
        key, _, text = override.partition("=")
        values: dict[str, Any] = {}
        _apply(values, override)
        if without_credentials(values) != values or without_credentials(text) != text:
            raise ConfigError(
                f"{key}: its value holds a credential, and Ray's dashboard shows overrides of the daemon; "
                "write it into the file of --config, or give the credential in the environment of the nodes"
            )


def load_config(path: Path, overrides: list[str]) -> RunConfig:
    """Read a YAML file, apply `dotted.key=value` overrides, and validate the result.

    Relative source and model paths are relative to the working directory; `cluster.runtime.anchor` resolves `storage`.

    Raises:
        ConfigError: the file cannot be read or is not YAML, an override is malformed, or a value is not allowed.
    """
    path = _shipped(path)
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; `ls configs` shows what there is") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not a YAML file: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: holds {type(values).__name__}, keys and values are needed")
    for override in overrides:
        _apply(values, override)
    try:
        config = RunConfig.model_validate(values)
    except ValidationError as error:
        raise ConfigError("\n".join(f"{path}: {_explain(item)}" for item in error.errors())) from None
    return _with_absolute_paths(config)


def _apply(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"{override!r}: an override has the form dotted.key=value")
    *sections, last = key.split(".")
    for section in sections:
        below = values.setdefault(section, {})
        if not isinstance(below, dict):
            raise ConfigError(f"{override!r}: {section} is a value, not a section")
        values = below
    try:
        values[last] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{override!r}: the value is not YAML: {' '.join(str(error).split())}") from None


def _explain(error: ErrorDetails) -> str:
    """One validation error as `train.zero_stage: 4 is not one of 0, 1, 2, 3`."""
    key = ".".join(str(part) for part in error["loc"])
    value, context = error["input"], error.get("ctx", {})
    if error["type"] == "extra_forbidden":
        return f"{key}: no such key; there are {', '.join(_known_keys(error['loc'][:-1]))}"
    if error["type"] == "missing":
        return f"{key}: is missing"
    if error["type"] == "literal_error":
        return f"{key}: {value!r} is not one of {str(context['expected']).replace(chr(39), '').replace(' or ', ', ')}"
    if error["type"] == "value_error":
        return f"{key}: {context['error']}" if key else str(context["error"])
    return f"{key}: {value!r}: {error['msg'][:1].lower()}{error['msg'][1:]}"


def _known_keys(section: tuple[int | str, ...]) -> list[str]:
    model: type[StageConfig] = RunConfig
    for part in section:
        annotation = model.model_fields[str(part)].annotation
        model = next(kind for kind in (annotation, *get_args(annotation)) if isinstance(kind, type))
    return sorted(model.model_fields)


def _with_absolute_paths(config: RunConfig) -> RunConfig:
    """The configuration with absolute paths, because workers have other working directories than the command line."""
    source = config.source.model_copy(update={"path": _absolute(config.source.path)})
    template = config.student.chat_template
    paths = {"model": _absolute_model(config.student.model), "chat_template": template and _absolute(template)}
    student = config.student.model_copy(update=paths)
    keys = ("backend", "model", "tokenizer", "stages", "mix")
    teacher = _with_absolute_models({key: getattr(config.teacher, key) for key in keys})
    select = config.select.model_copy(update={"reward_model": _absolute_model(config.select.reward_model)})
    resume_from = config.train.resume_from
    train = config.train.model_copy(update={"resume_from": resume_from and _absolute(resume_from)})
    update = {"source": source, "student": student, "teacher": config.teacher.model_copy(update=teacher)}
    return config.model_copy(update={**update, "select": select, "train": train})


def _with_absolute_models(teacher: dict[str, Any], backend: str = "") -> dict[str, Any]:
    """The keys of a teacher, or some of them, with absolute paths of models; `backend` counts unless they name one.

    The model of an endpoint is a name there, even if a folder here has the same name.
    """
    backend = teacher.get("backend", backend)
    found = dict(teacher)
    for key in ("model", "tokenizer") if backend == "vllm" else ("tokenizer",):
        if isinstance(found.get(key), str):
            found[key] = _absolute_model(found[key])
    if "stages" in found:
        found["stages"] = {name: _with_absolute_models(part, backend) for name, part in found["stages"].items()}
    if "mix" in found:
        found["mix"] = tuple(_with_absolute_models(part, backend) for part in found["mix"])
    return found


def _absolute_model(model: str) -> str:
    if not model:  # no tokenizer is named; as a path, "" would be the working directory
        return model
    folder = Path(model).expanduser()
    is_folder = bool(model) and not model.startswith(PACKAGE_PREFIX) and folder.is_dir()
    return str(folder.resolve()) if is_folder else model


def _absolute(path: str) -> str:
    return path if "://" in path else str(_shipped(Path(path).expanduser()).absolute())


def _shipped(path: Path) -> Path:
    """`configs/...` of the installation, if the working directory has no such file; else `path`."""
    ours = REPOSITORY / path
    return ours if path.parts[:1] == ("configs",) and not path.exists() and ours.exists() else path
