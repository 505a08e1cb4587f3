"""The texts that Slurm gets: the batch script of a stage, and the commands that submit it."""

from __future__ import annotations

import fnmatch
import os
import shlex
from collections.abc import Mapping

from rlhf_core.jobs import Job, Resources
from rlhf_core.jobs.launchers import SlurmLauncher

FIRST_PORT, PORTS = 10_000, 20_000  # below those that Linux gives to clients
SEPARATOR = "rlhf-script"  # ends the here-document that sbatch reads


def batch_script(settings: SlurmLauncher, name: str, job: Job, agent: list[str]) -> str:
    """The batch script of a launch. It holds no secrets.

    It starts one node agent on each node and ends with their exit code. Slurm sends SIGUSR1 to the
    script alone when the time limit is near, and SIGTERM to everything when a job is cancelled or
    preempted. Only the first leads to a requeue by the script: a job that was cancelled would run
    again too if it were requeued.

    Args:
        name: of the Slurm job.
        job: the first of the launch; it has the placement of all.
        agent: command line of a node agent, with words that start with $ for this script's
            variables: $RLHF_ATTEMPT, $RLHF_RENDEZVOUS, and $SLURM_NODEID of each node.
    """
    step = _step(settings, agent, job.placement().nodes)
    return f"""#!/bin/bash
{_options(settings, name, job)}
restart=${{SLURM_RESTART_COUNT:-0}}
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
address=$(scontrol show node "$head" | sed -n 's/.*NodeAddr=\\([^ ]*\\).*/\\1/p')
port=$(({FIRST_PORT} + SLURM_JOB_ID % {PORTS}))
echo "rlhf: job $SLURM_JOB_ID on $SLURM_JOB_NODELIST, restart $restart, rendezvous $address:$port"
notice=
trap 'notice=1; echo "rlhf: the time limit is near"; scancel --signal=TERM "$SLURM_JOB_ID"' USR1
trap : TERM
{"".join(line + chr(10) for line in settings.setup)}\
export RLHF_ATTEMPT="$SLURM_JOB_ID-$restart" RLHF_RENDEZVOUS="$address:$port"
{step} &
wait $!; code=$?
while kill -0 $! 2>/dev/null; do wait $!; code=$?; done
if [ -n "$notice" ] && [ $code -ne 0 ] && [ "$restart" -lt {settings.max_restarts} ]; then
  scontrol requeue "$SLURM_JOB_ID" && sleep 60
fi
exit $code
"""


def _options(settings: SlurmLauncher, name: str, job: Job) -> str:
    place = job.placement()
    lines = [
        f"--job-name={name}",
        f"--nodes={place.nodes}",
        "--ntasks-per-node=1",
        f"--output={output_pattern(settings)}",
        "--open-mode=append",
        "--requeue",
        f"--signal=B:USR1@{settings.notice}",
    ]
    for option in ("partition", "account", "qos", "constraint", "gres"):
        value = getattr(settings, option)
        lines += [f"--{option}={value}"] if value is not None else []
    gpus = gpus_of(settings, place, job.samplers) if job.torchrun else 0
    lines += [f"--gpus-per-node={gpus}"] if gpus else []
    ranks = place.ranks if job.torchrun else 1
    if settings.cpus_per_rank is not None:
        lines.append(f"--cpus-per-task={settings.cpus_per_rank * ranks}")
    lines += [f"--time={settings.time_limit}"] if settings.time_limit is not None else []
    lines += ["--exclusive"] if settings.exclusive else []
    return "\n".join(f"#SBATCH {line}" for line in [*lines, *settings.options])


def gpus_of(settings: SlurmLauncher, place: Resources, samplers: int = 0) -> int:
    """GPUs of each node that are asked for by number; 0 where gres names them. All nodes are
    alike, so those beside the first one's get the samplers' for nothing."""
    if settings.gres is not None:
        return 0
    if settings.gpus_per_node is not None:
        return settings.gpus_per_node
    return place.ranks + samplers if place.device != "cpu" else 0


def _step(settings: SlurmLauncher, agent: list[str], nodes: int) -> str:
    """The srun command: one agent on each node, in the container if there is one."""
    words = [f'"{word}"' if word.startswith("$") else shlex.quote(word) for word in agent]
    srun = ["srun", "--kill-on-bad-exit=1", "--ntasks-per-node=1", "--cpu-bind=none", "--mpi=none"]
    srun += ["--label"] if nodes > 1 else []
    box = settings.container
    if box is not None and box.runtime == "pyxis":
        srun.append(f"--container-image={shlex.quote(box.image)}")
        if box.mounts:
            srun.append(f"--container-mounts={shlex.quote(','.join(_pairs(box.mounts)))}")
    elif box is not None:
        mounts = [f"--bind={shlex.quote(pair)}" for pair in _pairs(box.mounts)]
        words = ["apptainer", "exec", "--nv", *mounts, shlex.quote(box.image), *words]
    return f"{' '.join(srun)} sh -c {shlex.quote('exec ' + ' '.join(words))}"


def _pairs(mounts: tuple[str, ...]) -> list[str]:
    return [mount if ":" in mount else f"{mount}:{mount}" for mount in mounts]


def output_pattern(settings: SlurmLauncher) -> str:
    """Path of the jobs' output, with Slurm's %j for the id of the job."""
    return f"{settings.folder.rstrip('/')}/%x-%j.log"


def output_path(settings: SlurmLauncher, name: str, job_id: str) -> str:
    """The same of one job."""
    return output_pattern(settings).replace("%x", name).replace("%j", job_id)


def passed(settings: SlurmLauncher, environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The variables of an environment that a job gets."""
    return {
        name: value
        for name, value in sorted(environment.items())
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in settings.pass_environment)
    }


def submission(settings: SlurmLauncher, script: str, variables: Mapping[str, str]) -> str:
    """Shell commands that submit a batch script and print the id of its job.

    Variables are exported in the shell that runs sbatch, which hands its environment to the job.
    Its option --export is of no use for this: `--export=NAME=value` cuts values at commas and
    leaves out PATH, and its argument can be read by everybody.
    """
    exports = "".join(f"export {n}={shlex.quote(v)}\n" for n, v in variables.items())
    return (
        f"cd\nmkdir -p {shlex.quote(settings.folder)} || exit\n{exports}"
        f"sbatch --parsable <<'{SEPARATOR}'\n{script}{SEPARATOR}\n"
    )
