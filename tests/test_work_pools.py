"""Work pools: what the workers make of our templates, by the workers' own classes."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import botocore.session
import pytest
import yaml
from botocore.validate import ParamValidator
from kubernetes_asyncio.client import ApiClient
from moto import mock_aws
from prefect.blocks.system import Secret
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun
from prefect.settings import PREFECT_API_AUTH_STRING, temporary_settings
from prefect.workers.process import ProcessJobConfiguration
from prefect_aws.workers import ECSWorker
from prefect_aws.workers.ecs_worker import ECSJobConfiguration
from prefect_docker.worker import DockerWorkerJobConfiguration
from prefect_kubernetes.worker import KubernetesWorkerJobConfiguration

from deployments.environments import DeployError, WorkPoolSettings
from deployments.work_pools import base_job_template, pool_differs, put_pool
from deployments.work_pools.__main__ import main
from tests.jobs_fixtures import PREFECTS_SOCKETS, collected

__all__ = ["collected"]

pytestmark = PREFECTS_SOCKETS

SECRET = "admin:of-the-server"  # noqa: S105 - that it is nowhere is what is tested
ROOT = Path(__file__).parent.parent
RUN = FlowRun(id=uuid4(), flow_id=uuid4(), name="able-otter")


@pytest.fixture(autouse=True)
def signed_in() -> Iterator[None]:
    """The worker itself signs in to the server, with what it would hand on by value."""
    with temporary_settings({PREFECT_API_AUTH_STRING: SECRET}):
        yield


def template(kind: Any, **variables: Any) -> dict[str, Any]:
    return base_job_template(WorkPoolSettings(type=kind, variables=variables))


async def configured(configuration: Any, made: dict[str, Any], **values: Any) -> Any:
    """As a worker has it when it starts a flow run."""
    found = await configuration.from_template_and_values(made, values)
    found.prepare_for_flow_run(RUN)
    return found


async def test_process() -> None:
    """A process run has the heartbeat that the automations count on, and the deployment's own variables."""
    found = await configured(ProcessJobConfiguration, template("process"), env={"ELT_SCHEMA": "dev"})
    assert found.env["PREFECT_FLOWS_HEARTBEAT_FREQUENCY"] == "30"
    assert found.env["ELT_SCHEMA"] == "dev"


async def test_docker() -> None:
    """A container of our image, without rights that it does not need, gone afterwards; no secret by value."""
    made = template("docker", image="registry.example.com/elt-flows:1.0")
    found = await configured(DockerWorkerJobConfiguration, made, env={"ELT_SCHEMA": "dev"}, mem_limit="4g")
    assert (found.image, found.mem_limit, found.auto_remove) == (
        "registry.example.com/elt-flows:1.0",
        "4g",
        True,
    )
    assert found.privileged is False
    assert found.container_create_kwargs == {
        "init": True,
        "cap_drop": ["ALL"],
        "security_opt": ["no-new-privileges:true"],
    }
    assert found.env["ELT_SCHEMA"] == "dev"
    assert found.env["PREFECT_FLOWS_HEARTBEAT_FREQUENCY"] == "30"
    assert SECRET not in found.model_dump_json()


async def test_a_container_gets_its_secret_from_a_block(prefect_server: str) -> None:
    """As docker.yaml says it: the pool on the server names a block, and the worker fills in what is in it."""
    await Secret(value=SECRET).save("prefect-api-auth-string", overwrite=True)
    reference = {"PREFECT_API_AUTH_STRING": "{{ prefect.blocks.secret.prefect-api-auth-string }}"}
    settings = WorkPoolSettings(type="docker", variables={"env": reference})
    async with get_client() as client:
        await put_pool(client, "test-docker-secret", settings)
        try:
            assert await pool_differs(client, "test-docker-secret", settings) is None
            there = (await client.read_work_pool("test-docker-secret")).base_job_template
        finally:
            await client.delete_work_pool("test-docker-secret")
    assert SECRET not in json.dumps(there)
    found = await configured(DockerWorkerJobConfiguration, there, env={"ELT_SCHEMA": "dev"})
    assert found.env["PREFECT_API_AUTH_STRING"] == SECRET
    assert found.env["ELT_SCHEMA"] == "dev"


@dataclass
class Reply:
    """What the Kubernetes client reads a reply from."""

    data: str


async def test_kubernetes() -> None:
    """A job of our image, not as root, with resources, its secrets from a Secret, read by the own client."""
    made = template("kubernetes", image="elt-flows:1.0", namespace="elt", secret_name="elt-secrets")
    found = await configured(
        KubernetesWorkerJobConfiguration, made, env={"ELT_SCHEMA": "dev"}, memory_limit="4Gi"
    )
    async with ApiClient() as client:
        # By the names of its own model: what is misspelt is None.
        job: Any = client.deserialize(Reply(json.dumps(found.job_manifest)), "V1Job")
    assert job.metadata.namespace == "elt"
    assert (job.spec.backoff_limit, job.spec.ttl_seconds_after_finished) == (0, 3600)
    pod = job.spec.template
    assert pod.metadata.annotations["cluster-autoscaler.kubernetes.io/safe-to-evict"] == "false"
    assert pod.spec.restart_policy == "Never"
    assert pod.spec.termination_grace_period_seconds == 60
    assert (pod.spec.security_context.run_as_non_root, pod.spec.security_context.run_as_user) == (True, 10001)
    assert pod.spec.security_context.seccomp_profile.type == "RuntimeDefault"
    (container,) = pod.spec.containers
    assert (container.image, container.args) == ("elt-flows:1.0", ["prefect", "flow-run", "execute"])
    assert container.resources.requests == {"cpu": "250m", "memory": "1Gi"}
    assert container.resources.limits == {"memory": "4Gi"}
    # Optional: against a server without a password there is no Secret, and no pod would start.
    (secret,) = (one.secret_ref for one in container.env_from)
    assert (secret.name, secret.optional) == ("elt-secrets", True)
    assert container.security_context.allow_privilege_escalation is False
    assert container.security_context.capabilities.drop == ["ALL"]
    env = {one.name: one.value for one in container.env}
    assert env["ELT_SCHEMA"] == "dev"
    assert env["PREFECT__FLOW_RUN_ID"] == str(RUN.id)
    assert "PREFECT_API_AUTH_STRING" not in env
    assert SECRET not in json.dumps(found.job_manifest)


async def test_ecs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Fargate task of our image with roles, size and secrets by ARN, in the form that AWS takes."""
    for name, value in {
        "DEFAULT_REGION": "eu-west-1",
        "ACCESS_KEY_ID": "a",
        "SECRET_ACCESS_KEY": "b",
    }.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    arn = "arn:aws:secretsmanager:eu-west-1:123456789012:secret:elt-AbCdEf"
    made = template(
        "ecs",
        image="123456789012.dkr.ecr.eu-west-1.amazonaws.com/elt-flows:1.0",
        cluster="elt",
        execution_role_arn="arn:aws:iam::123456789012:role/elt-execution",
        task_role_arn="arn:aws:iam::123456789012:role/elt-task",
        configure_cloudwatch_logs=True,
        secrets=[{"name": "PREFECT_API_AUTH_STRING", "valueFrom": arn}],
    )
    found = await configured(ECSJobConfiguration, made, env={"ELT_SCHEMA": "dev"}, memory=4096)
    worker = ECSWorker(work_pool_name="elt-ecs")
    definition = worker._prepare_task_definition(found, "eu-west-1", RUN)
    assert _refused("RegisterTaskDefinition", definition) == ""
    assert (definition["cpu"], definition["memory"]) == ("512", "4096")
    assert (definition["networkMode"], definition["requiresCompatibilities"]) == ("awsvpc", ["FARGATE"])
    assert definition["executionRoleArn"].endswith(":role/elt-execution")
    (container,) = definition["containerDefinitions"]
    assert container["image"].endswith("/elt-flows:1.0")
    assert container["secrets"] == [{"name": "PREFECT_API_AUTH_STRING", "valueFrom": arn}]
    assert (container["stopTimeout"], container["essential"]) == (60, True)
    assert container["logConfiguration"]["logDriver"] == "awslogs"

    found.network_configuration = {}
    with mock_aws():  # the worker asks for the default network
        request = worker._prepare_task_run_request(found, definition, "arn:aws:ecs:definition", True)
    assert _refused("RunTask", request) == ""
    (override,) = request["overrides"]["containerOverrides"]
    env = {one["name"]: one["value"] for one in override["environment"]}
    assert env["ELT_SCHEMA"] == "dev"
    assert env["PREFECT_FLOWS_HEARTBEAT_FREQUENCY"] == "30"
    assert request["overrides"]["taskRoleArn"].endswith(":role/elt-task")
    assert SECRET not in json.dumps([definition, request])


def _refused(operation: str, parameters: dict[str, Any]) -> str:
    """What AWS's own description of its API says against these parameters."""
    model = botocore.session.get_session().get_service_model("ecs").operation_model(operation)
    return str(ParamValidator().validate(parameters, model.input_shape).generate_report())


def test_variables_that_are_none() -> None:
    """A value for a variable that the template does not have is an error, not one that is passed over."""
    with pytest.raises(DeployError, match="a process work pool has no variable imag; it has command, env"):
        template("process", imag="x")


def test_a_template_whole(capsys: pytest.CaptureFixture[str]) -> None:
    """The command prints a template that Prefect's own command takes."""
    assert main(["kubernetes"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == template("kubernetes")
    assert found["variables"]["properties"]["image"]["default"] == "elt-flows:latest"


def test_the_image_has_what_the_shipped_deployments_need(tmp_path: Path) -> None:
    """What installs the dependencies names extras that there are, with the adapters of our project."""
    text = (ROOT / "deployments" / "Dockerfile").read_text().replace("\\\n", " ")
    build = text.split("\nFROM ")[1]
    (extras,) = re.findall(r"^ARG EXTRAS=(\S+)$", build, re.MULTILINE)
    (copied,) = re.findall(r"^COPY (.+) \./$", build, re.MULTILINE)
    (run,) = (line for line in re.findall(r"^RUN (.+)$", build, re.MULTILINE) if "pip install" in line)
    for name in copied.split():
        shutil.copy(ROOT / name, tmp_path)
    pip = tmp_path / "bin" / "pip"
    pip.parent.mkdir()
    pip.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    pip.chmod(0o755)
    env = {"PATH": f"{pip.parent}:{os.environ['PATH']}", "EXTRAS": extras}
    found = subprocess.run(  # noqa: S603 - the image's own line, with a pip that only says what it is asked for
        ["/bin/sh", "-ec", run], cwd=tmp_path, env=env, capture_output=True, text=True, check=True, timeout=60
    )
    assert found.stdout.split() == ["install", "-c", "constraints.txt", f".[{extras}]"]
    project = tomllib.loads((tmp_path / "pyproject.toml").read_text())
    # The wheel is made of folders that are still empty; a missing one would be an error.
    packages = project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    assert all((tmp_path / name).is_dir() for name in packages)
    assert (tmp_path / project["project"]["readme"]).exists()
    needed = [one for name in extras.split(",") for one in project["project"]["optional-dependencies"][name]]
    profiles = yaml.safe_load((ROOT / "sandbox" / "dbt" / "profiles.yml").read_text())
    types = {target["type"] for profile in profiles.values() for target in profile["outputs"].values()}
    assert types <= {one.split(">")[0].removeprefix("dbt-") for one in needed if one.startswith("dbt-")}


def test_the_image_runs_the_code_that_is_in_it(tmp_path: Path) -> None:
    """By PYTHONPATH alone, from any folder: each flow is the image's own, and runs work in its folder."""
    for name in ("blocks", "deployments", "flows", "sandbox", "tasks"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    assert "PYTHONPATH=/opt/elt" in (ROOT / "deployments" / "Dockerfile").read_text()
    script = """if True:
        import inspect, json, pathlib
        from deployments.entries import read_entries
        from deployments.steps import change_to_repository
        files = [inspect.getfile(entry.flow.fn) for entry in read_entries()]
        print(json.dumps([change_to_repository()["directory"], str(pathlib.Path.cwd()), *files]))
    """
    found = subprocess.run(  # noqa: S603 - our own script
        [sys.executable, "-c", script],
        cwd="/",
        env={**os.environ, "PYTHONPATH": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=True,
        timeout=200,
    )
    folder, here, *files = json.loads(found.stdout)
    assert folder == here == str(tmp_path)
    assert files
    assert not [file for file in files if not file.startswith(f"{tmp_path}/flows/")]


def test_the_image_holds_no_secret_and_runs_as_nobody() -> None:
    """What goes into the image is what runs in it, by a list of what may; it does not run as root."""
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert ignored[1] == "*"
    assert {"**/.env*", "**/*.duckdb"} <= set(ignored)
    allowed = {line.removeprefix("!").rstrip("/") for line in ignored if line.startswith("!")}
    copied = {"pyproject.toml", "constraints.txt", "README.md", "LICENSE"}
    assert allowed == {"blocks", "deployments", "flows", "sandbox", "tasks", *copied}
    steps = [line for line in (ROOT / "deployments" / "Dockerfile").read_text().splitlines() if line]
    assert [line for line in steps if line.startswith("USER")] == ["USER 10001:10001"]
    assert not [line for line in steps if line.startswith("ARG") and "=" not in line]
