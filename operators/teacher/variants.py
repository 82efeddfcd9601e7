"""One teacher for each stage, and several teachers for one stage: other values of some keys of `TeacherConfig`."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from operators.models import resolve_model
from operators.teacher.config import TeacherConfig

REPAIR_SUFFIX = "_repair"  # added to the name of a stage for its second turns, which repair replies
REFLECTIONS = ("reflect_instructions", "reflect_responses")
STAGES = (*REFLECTIONS, "repair", "judge")
WEIGHT = "weight"


@dataclass(frozen=True)
class Member:
    """One of the teachers of a stage, and the share of the rows that it answers."""

    teacher: TeacherConfig
    weight: float


def check_variants(teacher: TeacherConfig) -> None:
    """Refuse stages and members of a mix that are not valid teachers.

    Raises:
        ValueError: it names the key below `teacher`, the value and what is allowed.
    """
    unknown = sorted(teacher.stages.keys() - set(STAGES))
    if unknown:
        raise ValueError(f"stages.{unknown[0]}: no such stage; there are {', '.join(STAGES)}")
    for name, changes in teacher.stages.items():
        _changed(teacher, changes, f"stages.{name}")
    for number, changes in enumerate(teacher.mix):
        weight = changes.get(WEIGHT, 1)
        if not isinstance(weight, int | float) or isinstance(weight, bool) or not 0 < weight < float("inf"):
            raise ValueError(f"mix.{number}.weight: {weight!r} is not a number above 0")
        _changed(teacher, _without_weight(changes), f"mix.{number}")


def teacher_of(teacher: TeacherConfig, stage: str) -> TeacherConfig:
    """The teacher of one stage.

    Args:
        teacher: with `stages`.
        stage: a name of STAGES, or a reflection followed by REPAIR_SUFFIX: for its second turns, the values of
            `stages.repair` override those of the reflection.
    """
    first = stage.removesuffix(REPAIR_SUFFIX)
    changes = teacher.stages.get(first, {})
    if first != stage:
        changes = changes | teacher.stages.get("repair", {})
    return _changed(teacher, changes, f"stages.{stage}") if changes else teacher


def members_of(teacher: TeacherConfig) -> list[Member]:
    """The teachers of a mix; the teacher itself if there is none."""
    if not teacher.mix:
        return [Member(teacher, 1.0)]
    plain = teacher.model_copy(update={"mix": ()})
    return [
        Member(_changed(plain, _without_weight(changes), f"mix.{number}"), float(changes.get(WEIGHT, 1)))
        for number, changes in enumerate(teacher.mix)
    ]


def member_of_row(row_id: str, weights: list[float]) -> int:
    """Index of the member that answers a row: the same in every run, for every turn and both orders of a judgement."""
    if len(weights) == 1:
        return 0
    digest = hashlib.sha256(f"teacher {row_id.partition(':')[0]}".encode()).digest()
    place = int.from_bytes(digest[:8], "big") / 2**64 * sum(weights)
    for number, weight in enumerate(weights):
        place -= weight
        if place < 0:
            return number
    return len(weights) - 1


def resolved(teacher: TeacherConfig) -> TeacherConfig:
    """The teacher with every vllm model, also of stages and members, resolved to the path that the engine loads.

    Raises:
        ModelNotFoundError: it names the key.
    """
    stages = {name: _resolved_changes(teacher, changes, name) for name, changes in teacher.stages.items()}
    mix = tuple(_resolved_changes(teacher, changes, f"mix.{n}") for n, changes in enumerate(teacher.mix))
    model = resolve_model(teacher.model, "teacher.model") if teacher.backend == "vllm" else teacher.model
    tokenizer = teacher.tokenizer and resolve_model(teacher.tokenizer, "teacher.tokenizer")
    return teacher.model_copy(update={"model": model, "tokenizer": tokenizer, "stages": stages, "mix": mix})


def every_teacher(teacher: TeacherConfig) -> Iterator[tuple[str, TeacherConfig]]:
    """All teachers that a run may ask, each once, with the configuration key that names it."""
    seen = []
    for stage in ("", *STAGES):
        chosen = _changed(teacher, teacher.stages.get(stage, {}), stage)
        for number, member in enumerate(members_of(chosen)):
            plain = member.teacher.model_copy(update={"stages": {}})
            if plain not in seen:
                seen.append(plain)
                key = f"teacher.stages.{stage}" if stage in teacher.stages else "teacher"
                yield (f"{key}.mix.{number}" if chosen.mix else key), plain


def _resolved_changes(teacher: TeacherConfig, changes: dict[str, Any], key: str) -> dict[str, Any]:
    if "model" not in changes or changes.get("backend", teacher.backend) != "vllm":
        return changes
    return changes | {"model": resolve_model(changes["model"], f"teacher.{key}.model")}


def _without_weight(changes: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in changes.items() if name != WEIGHT}


def _changed(teacher: TeacherConfig, changes: dict[str, Any], key: str) -> TeacherConfig:
    without = {"stages", "mix"} if key.startswith("mix") else {"stages"}
    nested = sorted(without & changes.keys())
    if nested:
        raise ValueError(f"{key}.{nested[0]}: cannot be set there")
    if not changes:
        return teacher
    try:
        return TeacherConfig.model_validate(teacher.model_dump(exclude=without) | changes)
    except ValidationError as error:
        item = error.errors()[0]
        place = ".".join([key, *(str(part) for part in item["loc"])])
        raise ValueError(f"{place}: {item['input']!r}: {item['msg']}") from None
