"""The client of an endpoint, tested with vLLM's own server, which most people run."""

import asyncio
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from http.client import HTTPConnection

import pytest

from operators.teacher.calls import Reply
from operators.teacher.config import TeacherConfig
from operators.teacher.openai_backend import OpenAIEndpoint


@pytest.fixture
def vllm_server(demo_model: str) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", "small", "--max-model-len", "512"]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", demo_model, *settings]
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    environment["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # as in our own engines: saves starting a process
    server = subprocess.Popen(
        [*command, "--dtype", "float32", "--enforce-eager"],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_until_healthy(port, server)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.terminate()
        server.wait(60)


def wait_until_healthy(port: int, server: subprocess.Popen[bytes]) -> None:
    until = time.monotonic() + 300
    while time.monotonic() < until:
        assert server.poll() is None, f"vLLM's server ended with {server.returncode}"
        connection = HTTPConnection("127.0.0.1", port, timeout=2)
        try:
            connection.request("GET", "/health")
            if connection.getresponse().status == 200:
                return
        except OSError:
            time.sleep(0.5)  # the start of an HTTP server can only be found by polling
        finally:
            connection.close()
    raise AssertionError("vLLM's server did not start within 300 s")


@pytest.mark.slow
def test_a_real_vllm_server(vllm_server: str) -> None:
    contents = ["Name a river.", "Name a mountain.", "word " * 600]

    async def answer_all() -> list[Reply]:
        teacher = TeacherConfig(backend="openai", model="small", base_url=vllm_server, api_key_env="A_VARIABLE_NOT_SET")
        client = OpenAIEndpoint(teacher)
        return await asyncio.gather(*(client.answer(call_of(content)) for content in contents))

    *answered, refused = asyncio.run(answer_all())
    for reply in answered:
        assert not reply["error"], reply["error"]
        assert (reply["finish_reason"], reply["generated_tokens"]) == ("length", 7)
        assert reply["prompt_tokens"] > 10
    assert "BadRequestError" in refused["error"]  # longer than the context


def call_of(content: str) -> dict[str, object]:
    messages = json.dumps([{"role": "user", "content": content}])
    return {"call_key": "0" * 64, "row_id": content, "messages": messages, "schema": "", "max_tokens": 7}
