"""The process group and the job for tests of engines in this process."""

from collections.abc import Iterator

import pytest
import torch

from operators.train.config import TrainConfig
from operators.train.engine import prepare_process
from operators.train.job import TrainJob
from operators.train.pack_order import read_index


@pytest.fixture(scope="session")
def process_group() -> Iterator[None]:
    """A gloo group of this process alone. A process can have only one, because DeepSpeed always keeps the first."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOCAL_RANK", "0")
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
        yield
        torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def job(process_group, tiny_model, packs_file, tmp_path_factory):
    """A ZeRO-3 job of one worker, inside a process group of this process."""
    folder = tmp_path_factory.mktemp("checkpoint")
    config = TrainConfig(
        zero_stage=3, max_steps=4, packs_per_step=3, learning_rate=1e-3, precision="fp32", activation_checkpointing=True
    )
    files = [packs_file]
    prepare_process(config)
    digest = read_index(files).digest
    return TrainJob(config, tiny_model, str(folder), files, digest, config.run_identity(digest, tiny_model))
