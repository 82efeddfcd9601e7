"""One teacher for each stage and several for one stage: their settings, and which rows each answers."""

from collections import Counter

import pytest
from pydantic import ValidationError

from operators.teacher.config import TeacherConfig
from operators.teacher.variants import every_teacher, member_of_row, members_of, teacher_of

BASE = {"backend": "openai", "model": "plain", "temperature": 0.7}


def test_a_stage_has_its_own_values_and_a_repair_has_those_of_both() -> None:
    stages = {
        "reflect_responses": {"model": "large", "max_tokens": 500},
        "repair": {"temperature": 0.0},
        "judge": {"model": "judge", "base_url": "http://127.0.0.1:1/v1"},
    }
    teacher = TeacherConfig.model_validate(BASE | {"stages": stages})
    found = {stage: teacher_of(teacher, stage) for stage in ("reflect_instructions", "reflect_responses", "judge")}
    assert {stage: one.model for stage, one in found.items()} == {
        "reflect_instructions": "plain",
        "reflect_responses": "large",
        "judge": "judge",
    }
    repair = teacher_of(teacher, "reflect_responses_repair")
    assert (repair.model, repair.temperature, repair.max_tokens) == ("large", 0.0, 500)
    assert [key for key, _ in every_teacher(teacher)] == [
        "teacher",
        "teacher.stages.reflect_responses",
        "teacher.stages.repair",
        "teacher.stages.judge",
    ]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"stages": {"reflecting": {}}}, "stages.reflecting: no such stage"),
        ({"stages": {"judge": {"temprature": 1}}}, r"stages.judge.temprature"),
        ({"stages": {"judge": {"temperature": 9}}}, r"stages.judge.temperature: 9"),
        ({"mix": [{"weight": 0}]}, r"mix.0.weight: 0 is not a number above 0"),
        ({"mix": [{"weight": 1, "mix": []}]}, r"mix.0.mix: cannot be set there"),
        ({"engine_kwargs": {"trust_remote_code": True}}, r"engine_kwargs.trust_remote_code: cannot be set"),
    ],
)
def test_a_wrong_variant_is_refused_by_its_key(changes: dict[str, object], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        TeacherConfig.model_validate(BASE | changes)


def test_a_mix_shares_the_rows_by_weight_and_a_row_keeps_its_teacher() -> None:
    mix = [{"model": "one", "weight": 3}, {"model": "two"}]
    members = members_of(TeacherConfig.model_validate(BASE | {"mix": mix}))
    assert [(member.teacher.model, member.weight) for member in members] == [("one", 3), ("two", 1)]
    weights = [member.weight for member in members]
    chosen = Counter(member_of_row(f"row {n}", weights) for n in range(4000))
    assert 0.72 < chosen[0] / 4000 < 0.78
    assert all(member_of_row(f"row {n}", weights) == member_of_row(f"row {n}:base_first", weights) for n in range(50))
