"""The manifests have the keys that KubeRay and Kubernetes know, agree with each other, and are safe by default.

The keys below were copied from KubeRay v1.7.0's API and include everything that the manifests use, so a misspelt key is
an error; `tests/data/kuberay` has the whole schemas.
"""

import copy
import gzip
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray
import yaml
from ray.autoscaler._private.kuberay.autoscaling_config import _get_custom_resources

from flows.config import load_config
from flows.launch import _parse
from flows.ui import _parse as parse_ui
from tests.cluster.crd_schemas import of_crd

FOLDER = Path(__file__).resolve().parents[2] / "cluster" / "manifests"
TEXT, WHOLE, TRUTH = {"type": "string", "minLength": 1}, {"type": "integer"}, {"type": "boolean"}
AMOUNT = {"type": "string", "pattern": r"^[0-9]+(\.[0-9]+)?(m|[KMGT]i)?$"}
TEXTS = {"type": "object", "additionalProperties": TEXT}
AMOUNTS = {"type": "object", "additionalProperties": AMOUNT}


def keys(required: dict[str, Any], optional: dict[str, Any] | None = None) -> dict[str, Any]:
    """An object with these keys and no others."""
    allowed = required | (optional or {})
    return {"type": "object", "properties": allowed, "required": list(required), "additionalProperties": False}


def many(item: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": item, "minItems": 1}


RESOURCES = keys({"requests": AMOUNTS, "limits": AMOUNTS})
REFERENCE = keys({"name": TEXT, "key": TEXT})
ENV = {
    "oneOf": [
        keys({"name": TEXT, "value": TEXT}),
        keys({"name": TEXT, "valueFrom": keys({"secretKeyRef": REFERENCE})}),
    ]
}
CONTAINER = keys(
    {"name": TEXT, "image": TEXT, "resources": RESOURCES, "securityContext": {"type": "object"}},
    {
        "imagePullPolicy": {"enum": ["IfNotPresent"]},
        "command": many(TEXT),
        "ports": many(keys({"containerPort": WHOLE, "name": TEXT})),
        "env": many(ENV),
        "envFrom": many(keys({"secretRef": keys({"name": TEXT}, {"optional": TRUTH})})),
        "livenessProbe": keys(
            {"exec": keys({"command": many(TEXT)})},
            dict.fromkeys(("initialDelaySeconds", "periodSeconds", "timeoutSeconds", "failureThreshold"), WHOLE),
        ),
        "volumeMounts": many(keys({"name": TEXT, "mountPath": TEXT})),
    },
)
VOLUME = {
    "oneOf": [
        keys({"name": TEXT, "persistentVolumeClaim": keys({"claimName": TEXT})}),
        keys({"name": TEXT, "emptyDir": keys({"medium": {"enum": ["Memory"]}, "sizeLimit": AMOUNT})}),
    ]
}
TOLERATION = keys({"key": TEXT, "operator": {"enum": ["Exists"]}, "effect": {"enum": ["NoSchedule"]}})
POD = keys(
    {"spec": keys(
        {"containers": many(CONTAINER), "securityContext": {"type": "object"}, "automountServiceAccountToken": TRUTH},
        {"volumes": many(VOLUME), "nodeSelector": TEXTS, "tolerations": many(TOLERATION), "restartPolicy": TEXT},
    )},
    {"metadata": keys({"labels": TEXTS})},
)  # fmt: skip
GROUP = keys(
    {"groupName": TEXT, "replicas": WHOLE, "minReplicas": WHOLE, "maxReplicas": WHOLE, "rayStartParams": TEXTS,
     "template": POD},
    {"idleTimeoutSeconds": WHOLE},
)  # fmt: skip
CLUSTER = keys(
    {
        "rayVersion": TEXT,
        "enableInTreeAutoscaling": TRUTH,
        "autoscalerOptions": keys(
            {"version": {"enum": ["v2"]}, "idleTimeoutSeconds": WHOLE, "resources": RESOURCES},
            {"upscalingMode": {"enum": ["Default", "Aggressive", "Conservative"]}, "imagePullPolicy": TEXT},
        ),
        "authOptions": keys({"mode": {"enum": ["token"]}}),
        "headGroupSpec": keys({"rayStartParams": TEXTS, "template": POD}),
        "workerGroupSpecs": many(GROUP),
    }
)
JOB = keys(
    {
        "entrypoint": TEXT,
        "submissionMode": {"enum": ["K8sJobMode"]},
        "shutdownAfterJobFinishes": TRUTH,
        "ttlSecondsAfterFinished": WHOLE,
        "backoffLimit": WHOLE,
        "rayClusterSpec": CLUSTER,
    },
    {"runtimeEnvYAML": TEXT},
)
CRON = keys({"schedule": TEXT, "timeZone": TEXT, "suspend": TRUTH, "jobTemplate": JOB})
CLAIM = keys({"accessModes": many(TEXT), "resources": keys({"requests": AMOUNTS})}, {"storageClassName": TEXT})
SELECTOR = keys({"matchLabels": TEXTS})
PORT = keys({"port": WHOLE, "name": TEXT})
KINDS = {
    "RayCluster": ("ray.io/v1", CLUSTER),
    "RayJob": ("ray.io/v1", JOB),
    "RayCronJob": ("ray.io/v1", CRON),
    "PersistentVolumeClaim": ("v1", CLAIM),
    "Service": ("v1", keys({"selector": TEXTS, "ports": many(PORT)})),
    "Deployment": (
        "apps/v1",
        keys({"replicas": WHOLE, "strategy": keys({"type": TEXT}), "selector": SELECTOR, "template": POD}),
    ),
    "StatefulSet": (
        "apps/v1",
        keys(
            {"serviceName": TEXT, "replicas": WHOLE, "selector": SELECTOR, "template": POD,
             "volumeClaimTemplates": many(keys({"metadata": keys({"name": TEXT}), "spec": CLAIM}))},
        ),
    ),
}  # fmt: skip


def objects(name: str = "*.yaml") -> list[dict[str, Any]]:
    files = [file for file in sorted(FOLDER.glob(name)) if file.name != "aws.yaml"]
    return [made for file in files for made in yaml.safe_load_all(file.read_text())]


def faults(made: dict[str, Any]) -> list[str]:
    version, spec = KINDS[made["kind"]]
    schema = keys({"apiVersion": {"const": version}, "kind": TEXT, "metadata": keys({"name": TEXT}), "spec": spec})
    return [f"{list(e.absolute_path)}: {e.message}" for e in jsonschema.Draft202012Validator(schema).iter_errors(made)]


def pods(made: Any) -> Iterator[dict[str, Any]]:
    """Every pod's specification inside an object."""
    if isinstance(made, dict):
        if "containers" in made:
            yield made
        for inner in made.values():
            yield from pods(inner)
    elif isinstance(made, list):
        for inner in made:
            yield from pods(inner)


def cluster() -> dict[str, Any]:
    [made] = objects("raycluster.yaml")
    spec: dict[str, Any] = made["spec"]
    return spec


@pytest.mark.parametrize("made", objects(), ids=lambda made: f"{made['kind']}-{made['metadata']['name']}")
def test_every_object_has_known_keys_of_the_right_type_and_no_others(made: dict[str, Any]) -> None:
    assert faults(made) == []


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (["authOptions", "mode"], "tokn"),
        (["workerGroupSpecs", 1, "minReplicas"], "0"),
        (["workerGroupSpecs", 2, "idleTimeoutSecond"], 9),
        (["headGroupSpec", "template", "spec", "containers", 0, "resources", "limits", "cpu"], "four"),
        (["headGroupSpec", "rayStartParams", "num-cpus"], 0),
    ],
)
def test_a_planted_error_is_found(path: list[Any], value: object) -> None:
    made = copy.deepcopy(objects("raycluster.yaml")[0])
    place = made["spec"]
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    assert len(faults(made)) == 1
    assert len(faults_by_kuberay(made, "raycluster")) == 1


def faults_by_kuberay(made: dict[str, Any], kind: str) -> list[str]:
    crd = json.loads(gzip.decompress((FOLDER.parents[1] / f"tests/data/kuberay/{kind}s.json.gz").read_bytes()))
    return [error.message for error in jsonschema.Draft202012Validator(of_crd(crd, "v1")).iter_errors(made)]


@pytest.mark.parametrize("kind", ["raycluster", "rayjob", "raycronjob"])
def test_the_whole_schemas_of_kuberay_accept_them(kind: str) -> None:
    [made] = objects(f"{kind}.yaml")
    assert faults_by_kuberay(made, kind) == []


def test_job_and_cron_job_start_the_same_cluster_that_stands() -> None:
    [job], [cron] = objects("rayjob.yaml"), objects("raycronjob.yaml")
    assert job["spec"]["rayClusterSpec"] == cron["spec"]["jobTemplate"]["rayClusterSpec"] == cluster()
    assert cluster()["rayVersion"] == ray.__version__


def test_the_pools_are_apart_and_the_head_runs_no_task() -> None:
    assert [group["groupName"] for group in cluster()["workerGroupSpecs"]] == ["cpu", "teacher", "student"]
    assert cluster()["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    gpus = [
        group["template"]["spec"]["containers"][0]["resources"]["limits"].get("nvidia.com/gpu")
        for group in cluster()["workerGroupSpecs"]
    ]
    assert gpus == [None, "4", "8"]
    configured = load_config(FOLDER.parents[1] / "configs" / "cluster.yaml", [])
    pools = [_get_custom_resources({}, group["rayStartParams"], "") for group in cluster()["workerGroupSpecs"]]
    assert pools == [{}, {"teacher_pool": 1}, {"student_pool": 1}]
    assert [*configured.teacher.custom_resources] == ["teacher_pool"]
    for stage in (configured.score, configured.train, configured.evaluate):
        assert [*stage.custom_resources] == ["student_pool"]
    launched = yaml.safe_load((FOLDER / "aws.yaml").read_text())["available_node_types"]
    assert [launched[pool]["resources"] for pool in ("teacher", "student")] == pools[1:]


@pytest.mark.parametrize("made", objects(), ids=lambda made: f"{made['kind']}-{made['metadata']['name']}")
def test_pods_are_unprivileged_pinned_and_guaranteed_what_they_ask_for(made: dict[str, Any]) -> None:
    for pod in pods(made):
        assert pod["securityContext"]["runAsNonRoot"] is True
        is_head = pod["containers"][0]["name"] == "ray-head"
        assert pod["automountServiceAccountToken"] is is_head, "only the autoscaler asks the API server"
        for container in pod["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert re.search(r":[\w.]*\d[\w.]*$", container["image"])
            memory = {side: container["resources"][side]["memory"] for side in ("requests", "limits")}
            assert memory["requests"] == memory["limits"]


def test_no_secret_stands_in_a_manifest_and_every_reference_has_its_object() -> None:
    text = "".join(file.read_text() for file in FOLDER.iterdir())
    assert not re.search(r"(PASSWORD|TOKEN|PG_URL|ALERT_URL), value:", text)
    claims = {made["metadata"]["name"] for made in objects() if made["kind"] == "PersistentVolumeClaim"}
    used = set(re.findall(r'"claimName": "([^"]+)"', json.dumps(objects())))
    assert used == claims


def test_what_the_first_run_asks_is_there_before_it() -> None:
    section = (FOLDER.parents[1] / "docs/operations.md").read_text().split("## On Kubernetes")[1].split("\n## ")[0]
    before, _ = section.split("the first run, which", 1)
    [host] = set(re.findall(r"@([\w-]+):5432", section))
    applied = re.findall(r"-f cluster/manifests/(\S+)", before[before.index("kubectl apply") :])
    services = [made["metadata"]["name"] for file in applied for made in objects(file) if made["kind"] == "Service"]
    assert host in services


def test_the_commands_are_ones_that_this_project_understands() -> None:
    [job], [cron] = objects("rayjob.yaml"), objects("raycronjob.yaml")
    for entrypoint in (job["spec"]["entrypoint"], cron["spec"]["jobTemplate"]["entrypoint"]):
        program, *arguments = entrypoint.split()
        assert program == "recycle-and-train"
        assert _parse(arguments).config == Path("/mnt/shared/cluster.yaml")
    [daemon] = [made for made in objects("daemon.yaml") if made["kind"] == "Deployment"]
    command = daemon["spec"]["template"]["spec"]["containers"][0]["command"]
    assert command[:3] == ["python", "-m", "flows.ui"]
    assert parse_ui(command[3:]).override == ["schedule.active=true", "schedule.existing_storage=true"]
    assert (daemon["spec"]["replicas"], daemon["spec"]["strategy"]) == (1, {"type": "Recreate"})


def test_the_launcher_file_has_the_keys_of_rays_own_schema_and_the_token_on_every_node() -> None:
    schema = json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text())
    made = yaml.safe_load((FOLDER / "aws.yaml").read_text())
    jsonschema.validate(made, schema)
    for commands in (made["head_start_ray_commands"], made["worker_start_ray_commands"]):
        assert "RAY_AUTH_MODE=token" in commands[-1]
    assert any(path.endswith(".ray/auth_token") for path in made["file_mounts"])
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(made | {"max_wrokers": 1}, schema)
