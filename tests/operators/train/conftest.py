"""The process group that the tests of engines in this process share."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(scope="session")
def process_group() -> Iterator[None]:
    """A gloo group of this process alone. There can be one a process only: DeepSpeed keeps the first for ever."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOCAL_RANK", "0")
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
        yield
        torch.distributed.destroy_process_group()
