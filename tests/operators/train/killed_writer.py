"""A process that is killed while it writes its second checkpoint, and the engine whose checkpoints it writes.

python killed_writer.py FOLDER
"""

import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from operators.train.checkpoint import CheckpointSpec
from operators.train.saving import Saver

SPEC = CheckpointSpec("identity", world_size=1, zero_stage=2)


class Engine:
    """In place of DeepSpeed's engine where only the order of events is tested: one shard, and a script beside it."""

    def __init__(self) -> None:
        self.device, self.weight = "cpu", torch.zeros(4)
        self.checkpoint_engine: Any = SimpleNamespace(save=torch.save)

    def save_checkpoint(self, folder: str, tag: str, **_: Any) -> None:
        Path(folder, tag).mkdir(exist_ok=True)
        self.checkpoint_engine.save({"weight": self.weight}, f"{folder}/{tag}/shard.pt")
        Path(folder, "script.py").write_text("")


def killed_while_writing(folder: Path) -> None:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    engine = Engine()

    def half(_: Any, path: str) -> None:
        Path(path).write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)

    with Saver(engine, SPEC) as saver:
        saver.save(folder, 1)
        saver.finish()
        engine.checkpoint_engine = SimpleNamespace(save=half)
        saver.save(folder, 2)


if __name__ == "__main__":
    killed_while_writing(Path(sys.argv[1]))
