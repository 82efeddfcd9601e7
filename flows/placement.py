"""The least resources that each stage needs, and whether the nodes of the cluster have them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from flows.config import RunConfig, evaluate_config
from flows.graph import EVALUATION, PACKED_SEQUENCES, RECYCLED_INSTRUCTIONS, SELECTED_INSTRUCTIONS, STUDENT
from operators.stage import Finding
from operators.student.pool import StudentPoolConfig
from operators.teacher.config import TeacherConfig
from operators.teacher.variants import every_teacher
from operators.teacher.vllm_backend import ranks
from operators.train.config import TrainConfig
from operators.train.memory import StudentSize, bytes_per_worker, copied_bytes, host_bytes_per_worker, saves_checkpoints

GIB = 1 << 30
BYTES_PER_PARAMETER = 4  # of a float32 file
STAGE_OF = {  # asset -> the stage whose demand it has
    SELECTED_INSTRUCTIONS: "score",
    RECYCLED_INSTRUCTIONS: "score",
    PACKED_SEQUENCES: "pack",
    STUDENT: "train",
    EVALUATION: "evaluate",
}
MEASURED = ("ifd", "ifd_rifd", "perplexity", "reward")  # values of select.policy that score with actors of a model
_CURE = "lower {key}, ask less for each, or add nodes (autoscaled: true if the cluster adds them itself)"
Node = Mapping[str, float]  # resources as Ray names them: CPU, GPU, memory (bytes)


@dataclass(frozen=True)
class Demand:
    """Equal units, such as actors, that a stage needs at the same time, each on one node.

    Attributes:
        stage: its name.
        count: number of units.
        unit: name of the units, plural.
        each: resources of one unit.
        key: configuration key that sets the count; to lower it is the cure.
        least: number of units without which the stage waits; None means all.
        together: units that belong on one node, where a node has room for them.
        cpus: configuration key of the CPUs of a unit, if tasks feed the units and need a CPU beside them.
    """

    stage: str
    count: int
    unit: str
    each: Mapping[str, float]
    key: str
    least: int | None = None
    together: int = 1
    cpus: str = ""

    def __str__(self) -> str:
        asked = ", ".join(f"{self.count * amount:g} {name}" for name, amount in self.each.items() if amount)
        return f"{asked} ({self.count} {self.unit})"

    def placeable(self, nodes: Sequence[Node]) -> int:
        """The number of units that fit on the nodes together, if nothing else runs there."""
        rooms = [self._room(node) for node in nodes]
        together = self.together if max(rooms, default=0) >= self.together else 1
        return sum(room - room % together for room in rooms)

    def leaves_a_cpu(self, nodes: Sequence[Node]) -> bool:
        """Whether some node has a CPU beside the units, for the tasks that feed them."""
        rooms, cpus, needed = [self._room(node) for node in nodes], self.each.get("CPU", 0.0), self.least or self.count
        here = (max(0, needed - (sum(rooms) - room)) for room in rooms)  # if the other nodes are filled first
        return any(node.get("CPU", 0.0) - count * cpus >= 1 for node, count in zip(nodes, here, strict=True))

    def _room(self, node: Node) -> int:
        wanted = {name: amount for name, amount in self.each.items() if amount}
        return int(min(node.get(name, 0) / amount for name, amount in wanted.items()))


def demands(config: RunConfig) -> list[Demand]:
    """One demand for each stage that holds resources while it runs, in the order of the graph."""
    train, pack = config.train, config.pack
    found = [_engines(teacher, key) for key, teacher in asked_teachers(config) if teacher.backend == "vllm"]
    alike = [[other for other in found if (other.count, other.each) == (one.count, one.each)] for one in found]
    found = [one for one, same in zip(found, alike, strict=True) if one is same[0]]
    if config.select.policy in MEASURED:
        found.append(_pool("score", config.score))
    tokenizers = {"CPU": pack.cpus_per_tokenizer}
    cpus = "pack.cpus_per_tokenizer"
    found.append(Demand("pack", pack.tokenizers, "tokenizers", tokenizers, "pack.tokenizers", cpus=cpus))
    workers = {"CPU": train.cpus_per_worker, "GPU": train.gpus_per_worker, **train.custom_resources}
    least = train.min_workers or None
    key = "train.min_workers" if least else "train.num_workers"
    found.append(Demand("train", train.num_workers, "workers", workers, key, least))
    return [*found, _pool("evaluate", evaluate_config(config))]


def asked_teachers(config: RunConfig) -> list[tuple[str, TeacherConfig]]:
    """The teachers that a run calls, by their configuration keys. The judge is included only if something is judged."""
    judges = config.evaluate.judge or config.select.policy == "judge"
    unused = [*([] if judges else ["judge"]), *([] if config.reflect.repair else ["repair"])]
    stages = {name: changes for name, changes in config.teacher.stages.items() if name not in unused}
    return list(every_teacher(config.teacher.model_copy(update={"stages": stages})))


def weigh(
    config: RunConfig,
    nodes: Sequence[Node],
    teacher_bytes: Mapping[str, int] | None = None,
    student_bytes: int = 0,
    size: StudentSize | None = None,
) -> list[Finding]:
    """The demands that the cluster cannot satisfy.

    Every finding is fatal, because the stage would wait forever; but not on a cluster that adds nodes.

    Args:
        config: what is asked for.
        nodes: what is there.
        teacher_bytes: of the weights of each teacher's model in float32 files, by the key of `asked_teachers`.
        student_bytes: of the student's; 0 if unknown.
        size: of the student, if it is known better than by its bytes.
    """
    findings = []
    for demand in demands(config):
        placeable, needed = demand.placeable(nodes), demand.least or demand.count
        if placeable < needed:
            each = " and ".join(f"{amount:g} {name}" for name, amount in demand.each.items() if amount)
            text = f"{demand.stage} needs {needed} {demand.unit} of {each} at once, the cluster can place {placeable}"
            cure = "it has to add nodes" if config.autoscaled else _CURE.format(key=demand.key)
            findings.append(Finding(demand.key, f"{text}; {cure}"))
        elif demand.cpus and not demand.leaves_a_cpu(nodes):
            text = (
                f"{demand.stage} takes every CPU ({demand}), and the tasks that feed it need one, or it waits forever"
            )
            findings.append(Finding(demand.cpus, f"{text}; lower it or {demand.key}, or add nodes"))
    size = size or StudentSize(student_bytes // BYTES_PER_PARAMETER)
    findings += _memory(config, nodes, teacher_bytes or {}, student_bytes, size)
    return [replace(finding, fatal=not config.autoscaled) for finding in findings]


def idle_gpus(config: RunConfig, nodes: Sequence[Node]) -> list[Finding]:
    """A warning that names the stages which use no GPU although the nodes have some."""
    unset = [
        f"{key}.device: gpu" for key, one in asked_teachers(config) if (one.backend, one.device) == ("vllm", "cpu")
    ]
    unset += ["train.gpus_per_worker: 1"] if not config.train.gpus_per_worker else []
    scores = config.select.policy in MEASURED and not config.score.gpus_per_actor
    unset += ["score.gpus_per_actor: 1"] if scores else []
    if not unset or not _gpus(nodes):
        return []
    text = f"the nodes have {_gpus(nodes):g} GPUs that these stages do not use; set {', '.join(unset)}"
    return [Finding(unset[0].partition(":")[0], text, fatal=False)]


def _gpus(nodes: Sequence[Node]) -> float:
    return sum(node.get("GPU", 0.0) for node in nodes)


def weight_bytes(model: str) -> int:
    """Bytes of a folder's safetensors; 0 for a model that is not in a folder, whose size is not checked."""
    return sum(file.stat().st_size for file in Path(model).glob("*.safetensors"))


def training_disk_bytes(train: TrainConfig, student_bytes: int, size: StudentSize | None = None) -> int:
    """Largest number of bytes that training writes: the student, and checkpoints of float32 weights and Adam's moments.

    Checkpoints hold only what is trained: with adapters, only the adapters.
    """
    checkpoints = train.keep_checkpoints if saves_checkpoints(train) else 0
    checkpoints += 1 if train.evaluate_every_steps else 0  # the best weights
    checkpoints += 1 if checkpoints else 0  # the one that is being written
    trained = BYTES_PER_PARAMETER * size.adapters if size and size.adapters else student_bytes
    return student_bytes + checkpoints * 3 * trained


def _engines(teacher: TeacherConfig, key: str) -> Demand:
    engines = teacher.replicas if isinstance(teacher.replicas, int) else teacher.replicas[0]
    if teacher.device == "cpu":
        each = {"CPU": teacher.cpus_per_replica, **teacher.custom_resources}
        return Demand(key, engines, "engines", each, f"{key}.replicas", cpus=f"{key}.cpus_per_replica")
    each = {"CPU": 1, "GPU": 1, **teacher.custom_resources}
    lower = f"{key}.tensor_parallel" if engines == 1 < ranks(teacher) else f"{key}.replicas"
    unit, of_engine = "ranks of engines", ranks(teacher)
    return Demand(key, engines * of_engine, unit, each, lower, together=of_engine, cpus=f"{key}.replicas")


def _pool(stage: str, pool: StudentPoolConfig) -> Demand:
    each = {"CPU": pool.cpus_per_actor, "GPU": pool.gpus_per_actor, **pool.custom_resources}
    return Demand(stage, pool.actors, "actors", each, f"{stage}.actors", cpus=f"{stage}.cpus_per_actor")


def _memory(
    config: RunConfig, nodes: Sequence[Node], teacher_bytes: Mapping[str, int], student_bytes: int, size: StudentSize
) -> list[Finding]:
    memory = [node.get("memory", 0.0) for node in nodes] or [0.0]
    train, findings = config.train, []
    for key, teacher in asked_teachers(config):
        need = teacher_bytes.get(key, 0) + teacher.cpu_kv_cache_gib * GIB
        if teacher.backend == "vllm" and teacher.device == "cpu" and need > max(memory):
            cure = f"set {key}.device: gpu" if _gpus(nodes) else f"lower {key}.cpu_kv_cache_gib"
            findings.append(_too_big(f"{key}.model", need, max(memory), cure))
    workers, copied = train.min_workers or train.num_workers, copied_bytes(size, train)
    offloaded = workers * host_bytes_per_worker(size, train)
    need = copied + offloaded + (0 if train.gpus_per_worker else workers * bytes_per_worker(size, train))
    if offloaded > max(memory) * len(memory):
        findings.append(_too_big("train.offload", offloaded, max(memory), "set train.offload: none"))
    elif need > max(memory) * len(memory):
        cures = ["set train.gpus_per_worker: 1"] if _gpus(nodes) and not train.gpus_per_worker else []
        cures += ["lower train.num_workers", "set train.lora.r"]
        cures += ["set train.checkpoint_in_background: false"] if copied else []
        findings.append(_too_big("student.model", need, max(memory), ", or ".join(cures)))
    pools = {"score": config.score} if config.select.policy in MEASURED else {}
    for stage, pool in {**pools, "evaluate": evaluate_config(config)}.items():
        if pool.gpus_per_actor == 0 and student_bytes > max(memory):
            findings.append(_too_big("student.model", student_bytes, max(memory), f"set {stage}.gpus_per_actor"))
    return findings


def _too_big(key: str, need: int, have: float, cure: str) -> Finding:
    return Finding(
        key, f"needs about {need / GIB:.1f} GiB, a node has {have / GIB:.1f} GiB; take a smaller model or {cure}"
    )
