"""One of two ZeRO-3 workers that train a step and export: `python exporting.py RANK FOLDER MODEL PACKS`.

Rank 0 writes FOLDER/measured.json and, beside each export, the logits of the engine.
"""

import ctypes
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from operators.train import export
from operators.train.config import TrainConfig
from operators.train.engine import loaded, prepare_process
from operators.train.job import TrainJob
from operators.train.lora import LoraConfig
from operators.train.pack_order import PackStore
from operators.train.shards import ShardWriter
from operators.train.trainer import Trainer

LIMIT = 5_000_000  # bytes of a file
EXPORTS = {"all": LoraConfig(), "merged": LoraConfig(r=4), "adapters": LoraConfig(r=4, merge=False)}


def main(rank: int, folder: Path, model: str, packs: str) -> None:
    """Train and export twice: all weights, and adapters."""
    os.environ["LOCAL_RANK"] = str(rank)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=2)
    config = TrainConfig(
        num_workers=2, zero_stage=3, max_steps=1, packs_per_step=2, learning_rate=1e-3, precision="fp32"
    )
    prepare_process(config)
    export.MAX_SHARD_SIZE = LIMIT  # type: ignore[assignment]
    measured = {}
    for lora in (LoraConfig(), LoraConfig(r=4)):
        settings = config.model_copy(update={"lora": lora})
        job = TrainJob(settings, model, str(folder), [packs], PackStore([packs]).digest, "identity")
        with loaded(job) as (engine, noise):
            store = PackStore(job.files)
            Trainer(job, engine, noise, store).step(0)
            for name, wanted in EXPORTS.items():
                if bool(wanted.r) == bool(lora.r):
                    measured[name] = _most_held(
                        lambda one=wanted, name=name: export.export_student(engine, model, folder / name, one)
                    )
            engine.eval()
            with torch.no_grad():
                logits = engine(input_ids=torch.tensor([store.pack(0).input_ids]), use_cache=False).logits
            if rank == 0:
                torch.save(logits, folder / ("adapted.pt" if lora.r else "all.pt"))
            everything = [None, None]
            dist.all_gather_object(everything, measured)
    if rank == 0:
        (folder / "measured.json").write_text(json.dumps(everything))
    dist.destroy_process_group()


def _most_held(act: Any) -> int:
    """The most bytes that this process has allocated while it gathers and writes, beyond those before the first."""
    found: list[int] = []
    write, gathered = ShardWriter.write, export._Weight.gathered

    def look() -> None:
        found.append(_allocated())

    def looking_write(self: Any, name: str, tensor: Any) -> None:
        look()
        write(self, name, tensor)
        look()

    def looking_gathered(self: Any) -> Any:
        look()
        return gathered(self)

    ShardWriter.write, export._Weight.gathered = looking_write, looking_gathered  # type: ignore[method-assign]
    try:
        act()
    finally:
        ShardWriter.write, export._Weight.gathered = write, gathered  # type: ignore[method-assign]
    return max(found) - found[0] if found else 0


class _Mallinfo(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",
            "usmblks",
            "fsmblks",
            "uordblks",
            "fordblks",
            "keep",
        )
    ]


def _allocated() -> int:
    """Bytes that are allocated by malloc, where torch has its tensors."""
    mallinfo = ctypes.CDLL(None).mallinfo2
    mallinfo.restype = _Mallinfo
    found = mallinfo()
    return int(found.uordblks + found.hblkhd)


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], sys.argv[4])
