"""The files that other programs read (pip, Docker, GitHub, Kubernetes, Slurm): they parse, and name what exists."""

import re
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]


def pins(requirements: list[str]) -> dict[str, str]:
    """Versions by the name of the package, of lines such as `torch==2.13.0`."""
    return dict(line.split("==") for line in requirements if "==" in line)


def project() -> dict[str, Any]:
    content: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return content


def extras() -> dict[str, list[str]]:
    content: dict[str, list[str]] = project()["optional-dependencies"]
    return content


def test_constraints_hold_every_pin_of_the_project() -> None:
    constraints = pins((ROOT / "constraints.txt").read_text().splitlines())
    wanted = pins(project()["dependencies"] + [pin for extra in ("test", "dev") for pin in extras()[extra]])
    assert wanted.items() <= constraints.items()


def test_constraints_name_exact_public_versions() -> None:
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        assert re.fullmatch(r"[\w.-]+==[\w.]+", line), line


def test_compose_starts_two_nodes_from_files_that_exist() -> None:
    compose = yaml.safe_load((ROOT / "docker/compose.yaml").read_text())
    nodes = compose["services"]
    assert list(nodes) == ["node0", "node1"]
    for name, node in nodes.items():
        context = ROOT / "docker" / node["build"]["context"]
        assert (context / node["build"]["dockerfile"]).is_file()
        assert node["hostname"] == name
        assert "--rdzv-endpoint=node0:29500" in node["command"]
        assert f"--nnodes={len(nodes)}" in node["command"]


@pytest.mark.parametrize("name", ["Dockerfile.cpu", "Dockerfile.cuda"])
def test_images_copy_only_what_docker_is_given(name: str) -> None:
    given = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert all((ROOT / path).exists() for path in given)
    copied = re.findall(r"^COPY ([^-.]\S*)", (ROOT / "docker" / name).read_text(), re.MULTILINE)
    assert copied
    assert set(copied) <= given


@pytest.mark.parametrize("name", ["Dockerfile.cpu", "Dockerfile.cuda"])
def test_images_are_pinned_and_not_root(name: str) -> None:
    text = (ROOT / "docker" / name).read_text()
    assert all(re.search(r":\d+\.\d+\.\d+", image) for image in re.findall(r"^FROM (\S+)", text, re.MULTILINE))
    assert re.search(r"^USER [1-9]", text, re.MULTILINE)


def test_workflow_calls_run_test_on_every_python() -> None:
    job = yaml.safe_load((ROOT / ".github/workflows/test.yml").read_text())["jobs"]["test"]
    assert job["strategy"]["matrix"]["python"] == ["3.11", "3.12", "3.13"]
    assert job["steps"][-1]["run"] == "./run test"


def test_hooks_use_the_tools_of_the_environment() -> None:
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    entries = [hook["entry"].split()[0] for hook in repository["hooks"]]
    assert repository["repo"] == "local"
    assert {Path(entry).name for entry in entries} <= pins(extras()["dev"]).keys()
    assert {str(Path(entry).parent) for entry in entries} == {".venv/bin"}


def test_kubernetes_pods_find_the_first_of_them() -> None:
    documents = list(yaml.safe_load_all((ROOT / "examples/kubernetes.yaml").read_text()))
    service, claim, job = documents
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert pod["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    assert f"--master-addr={job['metadata']['name']}-0.{pod['subdomain']}" in container["args"]
    assert f"--nnodes={job['spec']['completions']}" in container["args"]
    assert f"--nproc-per-node={container['resources']['limits']['nvidia.com/gpu']}" in container["args"]
    assert pod["volumes"][0]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]


@pytest.mark.parametrize("path", ["run", ".ci/run", "examples/slurm.sh"])
def test_scripts_are_executable_and_parse(path: str) -> None:
    script = ROOT / path
    assert script.stat().st_mode & 0o111
    shell = "bash" if "bash" in script.read_text().splitlines()[0] else "sh"
    subprocess.run([shell, "-n", script], check=True)
