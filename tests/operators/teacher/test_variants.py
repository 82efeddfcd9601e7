"""One teacher for each stage and several for one stage: what each is, and which rows it answers."""

from collections import Counter

import pytest
from pydantic import ValidationError

from operators.teacher.config import TeacherConfig
from operators.teacher.variants import every_teacher, member_of_row, members_of, teacher_of

BASE = {"backend": "openai", "model": "plain", "temperature": 0.7}


def test_a_stage_has_its_own_values_and_a_repair_those_of_both() -> None:
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
        ({"mix": [{"weight": 0}]}, r"mix.0.weight: 0 is no number above 0"),
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


def test_only_what_decides_a_reply_is_in_the_key() -> None:
    plain = TeacherConfig.model_validate(BASE)
    same = {
        "rename_parameters": {"max_tokens": "max_completion_tokens"},
        "engine_kwargs": {"max_num_batched_tokens": 9},
    }
    assert TeacherConfig.model_validate(BASE | same).key_parts() == plain.key_parts()
    for changes in ({"top_k": 5}, {"stop": ["x"]}, {"leave_out_parameters": ["seed"]}, {"response_format": "none"}):
        assert TeacherConfig.model_validate(BASE | changes).key_parts() != plain.key_parts(), changes
    fp8 = TeacherConfig.model_validate(BASE | {"engine_kwargs": {"quantization": "fp8"}})
    assert fp8.key_parts() != plain.key_parts()
    assert fp8.identity() != plain.identity()
    assert TeacherConfig.model_validate(BASE | same).identity() == plain.identity()


def test_an_operational_key_of_a_stage_or_of_a_mix_throws_no_work_away() -> None:
    def identity(**changes: object) -> dict[str, object]:
        return TeacherConfig.model_validate(BASE | changes).identity()

    where = {"base_url": "http://elsewhere/v1", "api_key_env": "OTHER_KEY"}
    assert identity(stages={"judge": where}) == identity()
    assert identity(stages={"judge": where | {"top_k": 5}}) == identity(stages={"judge": {"top_k": 5}}) != identity()
    assert identity(mix=[where | {"weight": 2}, {"top_k": 5}]) == identity(mix=[{"weight": 2}, {"top_k": 5}])


def test_a_new_credential_changes_neither_identity_nor_keys() -> None:
    def teacher(secret: str) -> TeacherConfig:
        body = {"headers": {"Authorization": f"Bearer {secret}"}, "api_key": secret, "region": "eu"}
        return TeacherConfig.model_validate(BASE | {"backend": "openai", "extra_body": body})

    old, new = teacher("old-1234"), teacher("new-1234")
    assert (old.identity(), old.key_parts()) == (new.identity(), new.key_parts())
    assert "1234" not in f"{old.identity()} {old.key_parts()}"
    assert old.extra_body["api_key"] == "old-1234"


def test_two_calls_that_differ_in_what_may_be_a_credential_have_two_keys() -> None:
    def teacher(**changes: object) -> TeacherConfig:
        return TeacherConfig.model_validate(BASE | {"backend": "openai"} | changes)

    for key in ("think_token", "response_key", "password"):
        one, other = (teacher(chat_template_kwargs={key: text}) for text in ("<one>", "<other>"))
        assert one.key_parts() != other.key_parts()
    one, other = (teacher(extra_body={"chat_template_kwargs": {"image_token": text}}) for text in ("<a>", "<b>"))
    assert one.key_parts() != other.key_parts()
    assert one.identity() != other.identity()
