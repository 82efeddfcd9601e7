"""The doctor finds what is wrong with a teacher before any call is paid, and finds nothing in a valid one."""

import json
import shutil
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
from transformers import AutoTokenizer

from operators.teacher.config import TeacherConfig
from operators.teacher.doctor import check_teacher


def engine(model: str, **settings: Any) -> TeacherConfig:
    return TeacherConfig.model_validate({"model": model, "device": "cpu", "max_model_len": 1024} | settings)


def keys_and_texts(teacher: TeacherConfig) -> dict[str, str]:
    return {finding.key: finding.text for finding in check_teacher(teacher) if finding.fatal}


@pytest.fixture
def copied(tiny_model: str, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def test_a_sound_engine_has_no_findings(tiny_model: str) -> None:
    assert check_teacher(engine(tiny_model)) == []


def test_weights_that_are_not_safetensors_are_refused(copied: Path) -> None:
    (copied / "model.safetensors").rename(copied / "pytorch_model.bin")
    found = keys_and_texts(engine(str(copied)))
    assert list(found) == ["teacher.model"]
    assert "has only pytorch_model.bin, and a pickle is never loaded" in found["teacher.model"]


def test_a_half_copied_judge_is_refused_before_the_reflections(tiny_model: str, copied: Path) -> None:
    weights = copied / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    found = keys_and_texts(engine(tiny_model, stages={"judge": {"model": str(copied)}}))
    assert list(found) == ["teacher.stages.judge.model"]
    assert "model.safetensors cannot be read" in found["teacher.stages.judge.model"]


def test_a_tokenizer_of_another_model_is_refused(copied: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(copied)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|turn|>"]})
    tokenizer.chat_template = "{% for m in messages %}{{ '<|turn|>' + m.content }}{% endfor %}"
    tokenizer.save_pretrained(copied)
    found = keys_and_texts(engine(str(copied)))
    assert "1 tokens (<|turn|>) beyond the 49152 rows of the embeddings" in found["teacher.model"]


@pytest.mark.parametrize("template", ["{{ raise_exception('no system turn') }}", "{% for %}", None])
def test_a_template_that_cannot_be_rendered_is_refused(copied: Path, template: str | None) -> None:
    if template is None:
        (copied / "chat_template.jinja").unlink()
        settings = json.loads((copied / "tokenizer_config.json").read_text())
        settings.pop("chat_template", None)
        (copied / "tokenizer_config.json").write_text(json.dumps(settings))
    else:
        (copied / "chat_template.jinja").write_text(template)
    said = "it has no chat template; take" if template is None else "chat template cannot be rendered"
    assert said in keys_and_texts(engine(str(copied)))["teacher.model"]


def test_a_context_longer_than_the_model_is_refused(tiny_model: str) -> None:
    found = keys_and_texts(engine(tiny_model, max_model_len=4096))
    assert "4096 is more than the 2048 positions" in found["teacher.max_model_len"]


def test_an_engine_of_several_processes_needs_gpus(tiny_model: str) -> None:
    found = keys_and_texts(engine(tiny_model, tensor_parallel=2))
    assert "2 processes of an engine need GPUs" in found["teacher.tensor_parallel"]


def test_the_teacher_of_a_stage_is_looked_at_too(tiny_model: str) -> None:
    found = keys_and_texts(engine(tiny_model, stages={"judge": {"max_model_len": 4096}}))
    assert list(found) == ["teacher.stages.judge.max_model_len"]


@pytest.mark.slow
def test_arguments_are_checked_against_those_of_the_engine(tiny_model: str) -> None:
    found = keys_and_texts(engine(tiny_model, engine_kwargs={"quantisation": "fp8"}, reasoning_parser="qwen"))
    assert "no such engine argument" in found["teacher.engine_kwargs.quantisation"]
    assert "qwen3" in found["teacher.reasoning_parser"]
    assert keys_and_texts(engine(tiny_model, engine_kwargs={"max_num_batched_tokens": 512})) == {}


class Endpoint(BaseHTTPRequestHandler):
    """Answers the request for the list of models with `answer`."""

    answer: ClassVar[tuple[int, Any]] = (200, {})

    def do_GET(self) -> None:
        status, body = self.answer
        payload = body.encode() if isinstance(body, str) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def address() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Endpoint) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}/v1"
        server.shutdown()


MODELS = {"object": "list", "data": [{"id": name, "object": "model", "created": 0, "owned_by": "us"} for name in "ab"]}


@pytest.mark.parametrize(
    ("answer", "key", "fatal"),
    [
        ((200, MODELS), "", False),
        ((404, {"error": {"message": "no such page"}}), "", False),
        ((501, "Unsupported method"), "", False),
        ((200, "<html>"), "", False),
        ((401, {"error": {"message": "bad key sk-secret"}}), "teacher.api_key_env", True),
        ((200, {"object": "list", "data": [{"id": "other"}]}), "teacher.model", False),
    ],
)
def test_an_endpoint_is_only_asked_for_what_costs_nothing(
    address: str, monkeypatch: pytest.MonkeyPatch, answer: tuple[int, Any], key: str, fatal: bool
) -> None:
    monkeypatch.setattr(Endpoint, "answer", answer)
    monkeypatch.setenv("A_KEY", "sk-secret")
    teacher = TeacherConfig(backend="openai", model="a", base_url=address, api_key_env="A_KEY")
    found = [finding for finding in check_teacher(teacher) if finding.fatal or finding.key != "teacher.base_url"]
    assert [(finding.key, finding.fatal) for finding in found] == ([(key, fatal)] if key else [])
    assert "sk-secret" not in str(found)


def test_an_address_without_v1_is_a_warning(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Endpoint, "answer", (404, {"detail": "Not Found"}))
    [finding] = check_teacher(TeacherConfig(backend="openai", model="a", base_url=address.removesuffix("/v1")))
    assert (finding.key, finding.fatal) == ("teacher.base_url", False)
    assert "/models is not there; the address of a vLLM server ends in /v1" in str(finding)


def test_replies_without_a_limit_are_a_warning(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Endpoint, "answer", (200, MODELS))
    teacher = TeacherConfig(backend="openai", model="a", base_url=address, leave_out_parameters=("max_tokens",))
    [finding] = check_teacher(teacher)
    assert (finding.key, finding.fatal) == ("teacher.leave_out_parameters", False)
    assert "the budget can be exceeded" in finding.text


def test_an_address_where_nobody_answers_is_refused() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{unused.getsockname()[1]}/v1"
        found = keys_and_texts(TeacherConfig(backend="openai", model="a", base_url=address))
    assert "nobody answers" in found["teacher.base_url"]


def test_a_missing_key_for_a_distant_endpoint_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_KEY", raising=False)
    teacher = TeacherConfig(backend="openai", model="a", base_url="ftp://example.invalid/v1", api_key_env="NO_KEY")
    assert [(finding.key, finding.fatal) for finding in check_teacher(teacher)] == [
        ("teacher.api_key_env", False),
        ("teacher.base_url", True),
    ]
