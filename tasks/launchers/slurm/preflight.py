"""Checks a pipeline against the cluster before it starts: commands, partition, limits, store."""

from __future__ import annotations

import re
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from rlhf_core.errors import ConfigError, JobFailed, RLHFError
from rlhf_core.jobs import ImportModelJob, PipelineConfig, Resources
from rlhf_core.jobs.launchers import SlurmLauncher
from rlhf_core.pipeline.placements import placements, samplers_of
from rlhf_core.store import open_store
from rlhf_core.store.settings import read_settings
from rlhf_core.system.secrets import redact
from tasks.launchers.slurm import script
from tasks.launchers.slurm.client import Client
from tasks.launchers.slurm.shell import Unreachable

COMMANDS = ("sbatch", "srun", "squeue", "scontrol", "scancel", "sinfo")
PROBE_SECONDS = 120.0
PROBE = (
    "from rlhf_core.store import open_store; open_store({store!r}).check(); "
    "import torch, tasks.launchers.node_agent; print('probe: interpreter and store work')"
)
LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class Facts:
    """What a cluster says about itself.

    Attributes:
        missing: commands that are not installed.
        config: `scontrol show config`; {} if the controller does not answer.
        partitions: name -> fields of `scontrol show partition`.
        gpus: partition -> GPUs of each of its nodes.
        folder: whether launcher.folder can be written.
        store: whether a store that is a folder is there.
    """

    missing: Sequence[str] = ()
    config: Mapping[str, str] = field(default_factory=dict)
    partitions: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    gpus: Mapping[str, Sequence[int]] = field(default_factory=dict)
    folder: bool = True
    store: bool = True


def check(config: PipelineConfig, remarks: list[str]) -> list[str]:
    """All problems that the cluster would have with a pipeline.

    Args:
        remarks: what a person should know, though it is no problem, is added.
    """
    settings = config.launcher
    assert isinstance(settings, SlurmLauncher)
    client = Client(settings)
    try:
        url = open_store(config.store).url
    except RLHFError:
        return []  # reported by `rlhf_core.preflight.check`
    try:
        text = client.shell.run(_questions(settings, url)).text
    except (Unreachable, ConfigError) as error:
        return [f"launcher: {redact(str(error))}"]
    problems = judge(config, url, read_facts(text))
    remarks += _about_the_store(settings, url)
    if settings.probe and not problems:
        problems += _probe(client, url, remarks)
    return problems


def _questions(settings: SlurmLauncher, store: str) -> str:
    folder, path = shlex.quote(settings.folder), shlex.quote(_path(store) or "/")
    return f"""cd
echo '== missing'; for c in {" ".join(COMMANDS)}; do command -v $c >/dev/null || echo $c; done
echo '== config'; scontrol show config 2>/dev/null
echo '== partitions'; scontrol show partition -o 2>/dev/null
echo '== nodes'; sinfo -h -N -o '%R|%N|%G' 2>/dev/null
echo '== folder'; mkdir -p {folder} 2>/dev/null && [ -w {folder} ] && echo yes
echo '== store'; [ -d {path} ] && echo yes
"""


def read_facts(text: str) -> Facts:
    """The answers to `_questions`."""
    parts = re.split(r"^== (\w+)$", text, flags=re.M)
    answers = {
        name: body.strip().splitlines()
        for name, body in zip(parts[1::2], parts[2::2], strict=False)
    }
    config = dict(re.findall(r"^(\w+)\s+= (.*)$", "\n".join(answers.get("config", [])), re.M))
    rows = [dict(re.findall(r"(\w+)=(\S*)", line)) for line in answers.get("partitions", [])]
    gpus: dict[str, list[int]] = {}
    for line in answers.get("nodes", []):
        name, _, gres = line.split("|", 2)
        # "gpu:h100:8(S:0-1),gpu:2": type, number, sockets
        found = re.findall(r"gpu(?::[^:,()]+)?:(\d+)(?![^,(])", gres)
        gpus.setdefault(name, []).append(sum(map(int, found)))
    return Facts(
        missing=answers.get("missing", []), config=config,
        partitions={row["PartitionName"]: row for row in rows if "PartitionName" in row},
        gpus=gpus, folder=answers.get("folder") == ["yes"], store=answers.get("store") == ["yes"],
    )  # fmt: skip


def judge(config: PipelineConfig, store: str, facts: Facts) -> list[str]:
    """The problems, each with what was found, what is needed and what to do.

    Args:
        store: its URL.
    """
    settings: Any = config.launcher
    where = settings.host or "this machine"
    if facts.missing:
        return [
            f"launcher: {where} has no {', '.join(facts.missing)}; launcher.type slurm needs "
            "Slurm's commands: set launcher.host to a login node, or install slurm-client"
        ]
    if "KillWait" not in facts.config:
        return [f"launcher: Slurm's controller does not answer on {where}; try there: sinfo"]
    problems = []
    if not facts.folder:
        problems.append(
            f"launcher.folder {settings.folder} cannot be written on {where}; set a folder on a "
            "file system that login node and compute nodes share"
        )
    if _path(store) and not facts.store:
        problems.append(
            f"the store {store} is a folder that {where} does not have; set store to a "
            "folder that the cluster shares, or to s3://"
        )
    stages = placements(config)
    problems += _check_times(settings, facts, stages)
    name = settings.partition or next(
        (n for n, p in facts.partitions.items() if p.get("Default") == "YES"), None
    )
    known = ", ".join(facts.partitions)
    if name is None:
        return [*problems, f"launcher.partition is empty, and the cluster has no default: {known}"]
    if name not in facts.partitions:
        return [*problems, f"launcher.partition {name} does not exist; the cluster has {known}"]
    samplers = {stage: samplers_of(config, stage) for stage in stages}
    return problems + _check_partition(settings, name, facts, stages, samplers)


def _check_times(
    settings: SlurmLauncher, facts: Facts, stages: Mapping[str, Resources]
) -> list[str]:
    problems = []
    wait = int(re.match(r"\d+", facts.config["KillWait"])[0])  # type: ignore[index]
    longest = max((r.stop_timeout for r in stages.values()), default=0)
    if wait < longest:
        problems.append(
            f"resources.stop_timeout is {longest} s, but the cluster kills processes {wait} s "
            f"after SIGTERM (KillWait): set stop_timeout to at most {wait}, or ask its "
            f"administrator for a KillWait of {longest}"
        )
    if settings.notice < longest + 10:
        problems.append(
            f"launcher.notice is {settings.notice} s, but ranks may take {longest} s "
            f"(stop_timeout) to store a checkpoint; set at least {longest + 10}"
        )
    limit = seconds(settings.time_limit)
    if limit is not None and limit <= settings.notice + 60:
        problems.append(
            f"launcher.time_limit {settings.time_limit} leaves nothing beside launcher.notice "
            f"({settings.notice} s, and Slurm may be a minute early); raise time_limit"
        )
    return problems


def _check_partition(
    settings: SlurmLauncher,
    name: str,
    facts: Facts,
    stages: Mapping[str, Resources],
    samplers: Mapping[str, int],
) -> list[str]:
    partition, problems = facts.partitions[name], []
    if partition.get("State", "UP") != "UP":
        problems.append(f"launcher.partition {name} is {partition['State']}; it must be UP")
    limit, most = seconds(settings.time_limit), seconds(partition.get("MaxTime"))
    if limit is not None and most is not None and limit > most:
        problems.append(
            f"launcher.time_limit is {settings.time_limit}, but partition {name} allows "
            f"{partition['MaxTime']}; lower it: a stage goes on in the next job"
        )
    for option, field_ in (("account", "AllowAccounts"), ("qos", "AllowQos")):
        value, allowed = getattr(settings, option), partition.get(field_, "ALL")
        if value is not None and allowed != "ALL" and value not in allowed.split(","):
            problems.append(
                f"launcher.{option} is {value}, but partition {name} allows {allowed}; use one"
            )
    numbers = [partition.get(key, "") for key in ("TotalNodes", "MaxNodes")]
    nodes = min((int(n) for n in numbers if n.isdigit()), default=None)
    gpus = facts.gpus.get(name, ())
    for stage, place in stages.items():
        if nodes is not None and place.nodes > nodes:
            problems.append(
                f"{stage}.resources.nodes is {place.nodes}, but partition {name} gives at most "
                f"{nodes}; lower it, or use another partition"
            )
        beside = samplers[stage]
        wanted = script.gpus_of(settings, place, beside)
        enough = sum(count >= wanted for count in gpus)
        if wanted and enough < place.nodes:
            of = f" ({place.ranks} ranks and {beside} for samplers)" if beside else ""
            many = f"{place.nodes} node{'s' if place.nodes > 1 else ''}"
            problems.append(
                f"{stage} needs {many} with {wanted} GPUs each{of}, but partition "
                f"{name} has {enough} (largest: {max(gpus, default=0)}); lower resources.ranks"
                f"{', rollout.ranks' if beside else ''} or nodes, or set resources.device to cpu"
            )
    return problems


def seconds(text: str | None) -> int | None:
    """A time as Slurm writes it: minutes, M:S, H:M:S, D-H, D-H:M or D-H:M:S. None for no limit."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text or "")
    if match is None:
        return None
    days, *rest = match.groups()
    numbers = [int(n) for n in rest if n is not None]
    units = (3600, 60, 1) if days is not None or len(numbers) == 3 else (60, 1, 0)
    return int(days or 0) * 86_400 + sum(n * u for n, u in zip(numbers, units, strict=False))


def _path(store: str) -> str | None:
    """The folder of a store that is one."""
    parts = urlsplit(store)
    return parts.path or store if parts.scheme in ("", "file") else None


def _about_the_store(settings: SlurmLauncher, store: str) -> list[str]:
    if _path(store) is not None:
        mounted = " (and in the container, see launcher.container.mounts)"
        return [
            f"the store {store} is a folder: the compute nodes must see it under the same path"
            f"{mounted if settings.container else ''}; launcher.probe: true tries it"
        ]
    host = urlsplit(read_settings().endpoint_name()).hostname
    if host in LOOPBACK:
        return [
            f"the store's endpoint is on {host}, this machine's own address: compute nodes reach "
            "it only if they are this machine"
        ]
    return []


def _probe(client: Client, store: str, remarks: list[str]) -> list[str]:
    """Run a job of a second on one node, which opens the store."""
    settings = client.settings
    name = "rlhf-probe"
    command = [settings.python, "-c", PROBE.format(store=store)]
    text = script.batch_script(settings, name, ImportModelJob(source="builtin:probe"), command)
    try:
        job_id = client.submit(name, text, script.passed(settings))
    except (ConfigError, JobFailed) as error:
        return [f"launcher.probe: {error}"]
    path, end = script.output_path(settings, name, job_id), time.monotonic() + PROBE_SECONDS
    while time.monotonic() < end:
        look = client.look(job_id, path, 0)
        if look.job is None or look.job.ended:
            said = redact(look.output.decode("utf-8", "replace")).strip()
            if "probe: interpreter and store work" in said:
                return []
            return [
                f"launcher.probe: job {job_id} could not open the store with {settings.python} on "
                f"a node (output {path}): {' '.join(said.split())[-600:]}"
            ]
        time.sleep(1.0)
    client.cancel([job_id])
    remarks.append(f"launcher.probe: job {job_id} did not end within {PROBE_SECONDS:.0f} s")
    return []
