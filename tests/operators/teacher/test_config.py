"""The parts of a teacher's configuration that influence a reply are part of the key of a call."""

import pytest
from pydantic import ValidationError

from operators.teacher.config import TeacherConfig

BASE = {"backend": "openai", "model": "plain", "temperature": 0.7}


def test_places_and_speed_are_not_part_of_the_key() -> None:
    plain = TeacherConfig(backend="scripted", model="fluent")
    scaled = plain.model_copy(update={"replicas": (2, 9), "device": "cpu", "batch_rows": 1, "max_num_seqs": 3})
    assert plain.key_parts() == scaled.key_parts()
    assert plain.key_parts() != plain.model_copy(update={"temperature": 0.5}).key_parts()


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


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            {"data_parallel_size": 2},
            "engine_kwargs.data_parallel_size: Ray starts and places the engines; set replicas",
        ),
        ({"nnodes": 2}, "engine_kwargs.nnodes: Ray starts"),
        ({"pipeline_parallel_size": "4"}, "engine_kwargs.pipeline_parallel_size: '4' is not a whole number above 0"),
        ({"prefill_context_parallel_size": 0}, "engine_kwargs.prefill_context_parallel_size: 0 is not a whole number"),
    ],
)
def test_processes_that_nothing_would_place_are_refused(arguments: dict[str, object], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        TeacherConfig.model_validate(BASE | {"engine_kwargs": arguments})
    with pytest.raises(ValidationError, match=words):
        TeacherConfig.model_validate(BASE | {"stages": {"judge": {"engine_kwargs": arguments}}})
