"""A configuration that does not fit the cluster is refused before any call is paid, with the responsible key."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from flows.config import ConfigError, load_config
from flows.placement import GIB, Demand, demands, idle_gpus, training_disk_bytes, weigh
from operators.train.memory import StudentSize

REPOSITORY = Path(__file__).resolve().parents[2]
SMOKE = REPOSITORY / "configs" / "smoke.yaml"
LAPTOP = {"CPU": 2.0, "memory": 16.0 * GIB}
NODE_OF_EIGHT = {"CPU": 96.0, "GPU": 8.0, "memory": 900.0 * GIB}
WEIGHTS = {"alpaca_7b": 28 * GIB, "cluster": 56 * GIB, "demo": GIB // 2, "long_context": 7 * GIB, "smoke": GIB // 2}
NODES = {
    "alpaca_7b": [NODE_OF_EIGHT],
    "cluster": [NODE_OF_EIGHT | {"teacher_pool": 1.0}] * 2 + [NODE_OF_EIGHT | {"student_pool": 1.0}] * 4,
    "demo": [LAPTOP],
    "long_context": [NODE_OF_EIGHT],
    "smoke": [LAPTOP],
}


@pytest.mark.parametrize("name", sorted(path.stem for path in (REPOSITORY / "configs").glob("*.yaml")))
def test_every_shipped_configuration_fits_the_nodes_that_it_is_for(name: str) -> None:
    config = load_config(REPOSITORY / "configs" / f"{name}.yaml", [])
    assert weigh(config, NODES[name], {"teacher": WEIGHTS[name]}, WEIGHTS[name]) == []


@pytest.mark.parametrize(
    ("override", "key", "text"),
    [
        ("train.num_workers=64", "train.num_workers", "train needs 64 workers of 1 CPU at once, .* can place 2"),
        ("score.gpus_per_actor=1", "score.actors", "score needs 1 actors of 1 CPU and 1 GPU at once, .* can place 0"),
        ("score.cpus_per_actor=64", "score.actors", "score needs 1 actors of 64 CPU at once"),
        ("evaluate.gpus_per_actor=4", "evaluate.actors", "evaluate needs 1 actors of 1 CPU and 4 GPU at once"),
        ("pack.tokenizers=9", "pack.tokenizers", "pack needs 9 tokenizers of 0.5 CPU at once, .* can place 4"),
        ("teacher.backend=vllm", "teacher.replicas", "teacher needs 1 ranks of engines of 1 CPU and 1 GPU at once"),
    ],
)
def test_a_stage_that_cannot_be_placed_is_refused_by_its_key(override: str, key: str, text: str) -> None:
    [finding] = weigh(load_config(SMOKE, [override]), [LAPTOP])
    assert finding.fatal
    assert finding.key == key
    assert re.search(text, finding.text), finding.text


def test_pools_are_weighed_apart_and_a_pool_that_no_node_has_is_refused() -> None:
    config = load_config(REPOSITORY / "configs" / "cluster.yaml", ["autoscaled=false"])
    found = weigh(config, [NODE_OF_EIGHT | {"teacher_pool": 1.0}] * 6)
    assert {finding.key for finding in found if finding.fatal} == {
        *("score.actors", "train.num_workers", "evaluate.actors"),
    }
    [train] = [finding.text for finding in found if finding.key.startswith("train")]
    assert "train needs 32 workers of 1 CPU and 1 GPU and 0.001 student_pool at once, the cluster can place 0" in train


def test_a_cluster_that_adds_nodes_is_waited_for() -> None:
    found = weigh(load_config(REPOSITORY / "configs" / "cluster.yaml", []), [LAPTOP])
    assert found
    assert not any(finding.fatal for finding in found)
    assert "can place 0; it has to add nodes" in found[0].text


@pytest.mark.parametrize("value", ["{GPU: 1}", "{pool: 0}", "{pool: -1}"])
def test_what_is_no_custom_resource_is_refused(value: str) -> None:
    for stage in ("teacher", "score", "train", "evaluate"):
        with pytest.raises(ConfigError, match=f"{stage}.custom_resources: "):
            load_config(SMOKE, [f"{stage}.custom_resources={value}"])


@pytest.mark.slow
@pytest.mark.long
def test_teacher_and_student_run_in_pools_of_their_own(tmp_path: Path, tiny_model: str) -> None:
    records = [{"instruction": f"Name {number} green things.", "output": "Grass."} for number in range(6)]
    (tmp_path / "source.json").write_text(json.dumps(records))
    environment = {name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "PYTHONPATH")}
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("pools.py")), str(tmp_path), tiny_model],
        cwd=REPOSITORY,
        env=environment | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    where = json.loads(done.stdout.splitlines()[-1])
    assert where.pop("VllmEngine") == ["teacher_pool"]
    student = ("_ScoringActor", "ModelActor", "RayTrainWorker")
    found = {name: places for name, places in where.items() if any(part in name for part in student)}
    assert len(found) >= len(student), where
    assert set(map(tuple, found.values())) == {("student_pool",)}, where


def test_an_elastic_training_waits_for_its_fewest_workers() -> None:
    elastic = ["train.num_workers=64", "train.min_workers=2"]
    assert weigh(load_config(SMOKE, elastic), [LAPTOP]) == []
    [finding] = weigh(load_config(SMOKE, [elastic[0], "train.min_workers=3"]), [LAPTOP])
    assert "train needs 3 workers of 1 CPU at once" in finding.text


def test_gpus_that_nothing_uses_are_named_with_the_keys() -> None:
    config = load_config(REPOSITORY / "configs/demo.yaml", [])
    [finding] = idle_gpus(config, [NODE_OF_EIGHT])
    assert not finding.fatal
    keys = ("teacher.device: gpu", "train.gpus_per_worker: 1", "score.gpus_per_actor: 1")
    assert str(finding).endswith(f"8 GPUs that these stages do not use; set {', '.join(keys)}")
    assert idle_gpus(config, [LAPTOP]) == []
    assert idle_gpus(load_config(REPOSITORY / "configs/alpaca_7b.yaml", []), [NODE_OF_EIGHT]) == []


@pytest.mark.parametrize(
    ("overrides", "cure"),
    [
        (["train.num_workers=8", "train.min_workers=4", "train.gpus_per_worker=1"], "lower train.min_workers"),
        (["teacher.backend=vllm", "teacher.device=gpu", "teacher.tensor_parallel=4"], "lower teacher.tensor_parallel"),
    ],
)
def test_the_cure_is_a_key_that_can_be_lowered(overrides: list[str], cure: str) -> None:
    first, *_ = weigh(load_config(SMOKE, overrides), [{"CPU": 32.0, "GPU": 2.0, "memory": 64.0 * GIB}])
    assert cure in str(first)


@pytest.mark.parametrize(
    ("overrides", "cpus", "key"),
    [
        (["score.actors=4"], 4.0, "score.cpus_per_actor"),
        (["score.actors=3"], 4.0, ""),
        (["train.num_workers=2", "train.cpus_per_worker=2"], 4.0, "evaluate.cpus_per_actor"),
        (["teacher.backend=vllm", "teacher.device=cpu"], 1.0, "teacher.cpus_per_replica"),
    ],
)
def test_actors_leave_a_cpu_for_the_tasks_that_feed_them(overrides: list[str], cpus: float, key: str) -> None:
    every = weigh(load_config(SMOKE, [*overrides, "evaluate.actors=2"]), [{"CPU": cpus, "memory": 64.0 * GIB}])
    found = [finding.key for finding in every if "takes every CPU" in str(finding)]
    assert (key in found) is bool(key), every
    assert not found if not key else True


def test_an_engine_of_several_gpus_is_placed_on_one_node() -> None:
    each = {"CPU": 1.0, "GPU": 1.0}
    engines = Demand("teacher", 12, "ranks of engines", each, "teacher.replicas", together=4)
    six = {"CPU": 32.0, "GPU": 6.0}
    assert engines.placeable([six, six]) == 8
    assert engines.placeable([{"CPU": 32.0, "GPU": 2.0}] * 6) == 12, "no node is large enough, so they span nodes"


def test_what_is_offloaded_has_to_fit_into_the_memory_of_the_hosts() -> None:
    gpus = ["train.gpus_per_worker=1", "train.offload=optimizer", "train.precision=bf16"]
    config = load_config(SMOKE, [*gpus, "train.num_workers=1", "evaluate.gpus_per_actor=0"])
    node = {**LAPTOP, "GPU": 1.0}
    assert weigh(config, [node], size=StudentSize(10**8)) == []
    [finding] = weigh(config, [node], size=StudentSize(10**9))
    assert finding.key == "train.offload"
    assert "GiB, a node has 16.0 GiB" in finding.text


def test_a_stage_that_does_not_run_asks_for_nothing() -> None:
    config = load_config(SMOKE, ["select.policy=none", "score.gpus_per_actor=1"])
    assert weigh(config, [LAPTOP]) == []
    assert [demand.stage for demand in demands(config)] == ["pack", "train", "evaluate"]


def test_the_judge_is_weighed_where_there_is_something_to_judge() -> None:
    judge = f"teacher.stages.judge={{backend: vllm, device: cpu, replicas: 3, cpu_kv_cache_gib: {64}}}"
    for used in (["evaluate.judge=true"], ["evaluate.judge=false", "select.policy=judge"]):
        found = weigh(load_config(SMOKE, [judge, *used]), [LAPTOP])
        assert [finding.key for finding in found] == ["teacher.stages.judge.replicas", "teacher.stages.judge.model"]
    assert weigh(load_config(SMOKE, [judge, "evaluate.judge=false"]), [LAPTOP]) == []
    by_teacher = load_config(SMOKE, ["select.policy=judge", "score.gpus_per_actor=1"])
    assert weigh(by_teacher, [LAPTOP]) == []


def test_teachers_that_need_the_same_are_one_demand() -> None:
    stages = "teacher.stages={judge: {temperature: 0.5}, reflect_responses: {replicas: 2}}"
    config = load_config(SMOKE, ["teacher.backend=vllm", "teacher.device=cpu", stages])
    asked = {demand.stage: demand.count for demand in demands(config) if demand.stage.startswith("teacher")}
    assert asked == {"teacher": 1, "teacher.stages.reflect_responses": 2}


def test_every_rank_of_an_engine_is_weighed() -> None:
    parallel = "tensor_parallel: 2, engine_kwargs: {pipeline_parallel_size: 4}"
    teacher = ["teacher.backend=vllm", "teacher.replicas=2", f"teacher.stages={{judge: {{{parallel}, replicas: 1}}}}"]
    config = load_config(SMOKE, [*teacher, "evaluate.judge=true"])
    [two, eight] = [demand for demand in demands(config) if demand.stage.startswith("teacher")]
    assert (two.count, eight.count, eight.key) == (2, 8, "teacher.stages.judge.tensor_parallel")
    [finding] = weigh(config, [{**LAPTOP, "CPU": 8.0, "GPU": 4.0}])
    assert "needs 8 ranks of engines of 1 CPU and 1 GPU at once, the cluster can place 4" in finding.text


def test_units_are_placed_whole_on_single_nodes() -> None:
    two_gpus_each = Demand("score", 4, "actors", {"CPU": 1, "GPU": 2}, "score.actors")
    assert two_gpus_each.placeable([{"CPU": 8, "GPU": 3}, {"CPU": 8, "GPU": 3}]) == 2
    assert two_gpus_each.placeable([{"CPU": 1, "GPU": 8}]) == 1


@pytest.mark.parametrize(
    ("teacher", "student", "key"),
    [(64 * GIB, GIB, "teacher.model"), (GIB, 8 * GIB, "student.model")],
)
def test_a_model_that_does_not_fit_into_memory_is_refused(teacher: int, student: int, key: str) -> None:
    config = load_config(REPOSITORY / "configs" / "demo.yaml", [])
    [finding] = weigh(config, [LAPTOP], {"teacher": teacher}, student)
    assert finding.key == key
    assert "GiB, a node has 16.0 GiB; take a smaller model or" in finding.text


def test_checkpoints_count_for_the_disk_only_if_there_are_any() -> None:
    short, long = (load_config(SMOKE, [f"train.max_steps={steps}"]).train for steps in (100, 101))
    assert training_disk_bytes(short, GIB) == GIB
    assert training_disk_bytes(long, GIB) == 10 * GIB
    timed = short.model_copy(update={"checkpoint_every_minutes": 5})
    assert training_disk_bytes(timed, GIB) == 10 * GIB


def test_copies_of_the_state_for_checkpoints_count_on_nodes_with_gpus_too() -> None:
    large = [{"CPU": 64, "GPU": 8, "memory": 64 * GIB}]
    config = load_config(REPOSITORY / "configs" / "alpaca_7b.yaml", [])
    [finding] = [found for found in weigh(config, large, student_bytes=28 * GIB) if found.key == "student.model"]
    assert "train.checkpoint_in_background: false" in finding.text
    blocking = load_config(REPOSITORY / "configs" / "alpaca_7b.yaml", ["train.checkpoint_in_background=false"])
    assert not [found for found in weigh(blocking, large, student_bytes=28 * GIB) if found.key == "student.model"]
