"""Launchers: how stages are started."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, field_validator

from rlhf_core.jobs.base import LARGEST, PositiveInt, Resources, Settings

Priority = Literal["high", "normal", "low"]


class LauncherSettings(Settings):
    """Base of the launchers."""

    several_nodes: ClassVar[bool] = False  # whether a stage may run on more than one

    @classmethod
    def nodes_problem(cls, resources: Resources, setting: str) -> str | None:
        """Why a stage cannot run on as many nodes as it asks for; None if it can."""
        if cls.several_nodes or resources.nodes == 1:
            return None
        kind = cls.model_fields["type"].default
        return (
            f"{setting}.nodes is {resources.nodes}, but launcher.type is {kind}, which runs a "
            "stage on one machine; set nodes to 1, or launcher.type to slurm or kubernetes"
        )


class LocalLauncher(LauncherSettings):
    """Runs a stage with torchrun on this machine, as a child of the flow's process."""

    type: Literal["local"] = "local"
    """Type of the launcher."""


class WorkPoolLauncher(LauncherSettings):
    """Runs a stage as a flow run of its own on a GPU work pool. Pipeline and worker share the
    store, no disk."""

    type: Literal["work_pool"] = "work_pool"
    """Type of the launcher."""
    deployment: str = "rlhf-job/gpu-job"
    """Deployment of the flow that runs one job, as FLOW/DEPLOYMENT."""
    queue_timeout: Annotated[int, Field(ge=10, le=LARGEST)] = 86_400
    """Seconds that a stage waits for a free slot of the pool before it fails."""


Word = Annotated[str, Field(pattern=r"^[^\s'\"]+$")]
Line = Annotated[str, Field(pattern=r"^[^\r\n]+$")]


class SlurmContainer(Settings):
    """Container image that the processes of a Slurm job run in."""

    runtime: Literal["pyxis", "apptainer"]
    """pyxis: `srun --container-image` (NVIDIA's Pyxis and Enroot). apptainer: `apptainer exec`."""
    image: Word
    """The image, as the runtime names it: `registry#name:tag` or a .sqsh file for Pyxis, a .sif
    file or `docker://name:tag` for Apptainer."""
    mounts: tuple[Word, ...] = ()
    """Folders of the node in the container, as FOLDER or FOLDER:FOLDER_IN_THE_CONTAINER. A store
    that is a folder has to be one of them."""


class SlurmLauncher(LauncherSettings):
    """Runs a stage as a Slurm batch job, on one or several nodes. Pipeline and nodes share the
    store. A job that is preempted, loses a node or reaches its time limit goes on from its last
    checkpoint."""

    several_nodes: ClassVar[bool] = True

    type: Literal["slurm"] = "slurm"
    """Type of the launcher."""
    host: Word | None = None
    """Login node that has Slurm's commands, as `ssh` names it (an entry of ~/.ssh/config, or
    user@host). Empty: the commands are on this machine."""
    folder: Word = ".rlhf/slurm"
    """Folder for the jobs' output, on a file system that login node and compute nodes share.
    Relative to the home folder, or absolute."""
    python: Word = "python3"
    """Python interpreter on the nodes (or in the container) that has this package."""
    setup: tuple[Line, ...] = ()
    """Lines of shell that the batch script runs first, such as `module load cuda`."""
    pass_environment: tuple[Word, ...] = (
        "AWS_*", "AZURE_*", "GOOGLE_*", "HF_TOKEN", "RLHF_STORE_*", "WANDB_*",
    )  # fmt: skip
    """Environment variables of the pipeline that a job gets, with * for any characters. Their
    values are in Slurm's memory and spool folder, not in the script, its arguments or the log."""
    scratch: Line | None = None
    """Folder on each node for the files of a running job, or a variable with it, such as `$TMPDIR`.
    Empty: below the node's RLHF_HOME."""
    partition: Word | None = None
    """Partition. Empty: the cluster's default."""
    account: Word | None = None
    """Account that is charged. Empty: the user's default."""
    qos: Word | None = None
    """Quality of service."""
    constraint: Line | None = None
    """Features that the nodes must have, such as `h100&ib`."""
    gres: Word | None = None
    """Generic resources of each node, such as `gpu:h100:8`. Empty: see gpus_per_node."""
    gpus_per_node: Annotated[int, Field(ge=0, le=LARGEST)] | None = None
    """GPUs of each node. Empty: one per rank, none for stages on the CPU or without ranks."""
    cpus_per_rank: PositiveInt | None = None
    """CPU cores for each rank. Empty: what the partition gives by default."""
    time_limit: Annotated[str, Field(pattern=r"^(\d+-)?\d+(:\d+){0,2}$")] | None = None
    """Longest time of one job, as Slurm writes it: minutes, H:M:S, or D-H:M:S. A stage that takes
    longer goes on in the next job. Empty: the partition's default."""
    notice: Annotated[int, Field(ge=10, le=3600)] = 120
    """Seconds before the time limit at which the ranks store a checkpoint and end. Slurm may tell
    them up to a minute earlier."""
    exclusive: bool = False
    """Whole nodes: no other job runs on them."""
    options: tuple[Line, ...] = ()
    """Further options of `sbatch`, one each, such as `--mem=0` or `--reservation=friday`."""
    container: SlurmContainer | None = None
    """Container of the processes. Empty: they run on the node itself."""
    max_restarts: Annotated[int, Field(ge=0, le=LARGEST)] = 100
    """How often one stage goes on after a preemption, a lost node or a time limit, before it
    fails."""
    queue_timeout: Annotated[int, Field(ge=10, le=LARGEST)] = 604_800
    """Seconds that a job may wait in the queue before the stage fails."""
    poll_seconds: Annotated[float, Field(ge=0.2, le=600)] = 10.0
    """Seconds between two looks at a job. Each is one request to Slurm's controller."""
    probe: bool = False
    """Let the preflight submit a job of a second, which checks that interpreter and store are
    reachable from a node. It waits for at most two minutes."""


Quantity = Annotated[str, Field(pattern=r"^\d+(\.\d+)?(m|[kMGTPE]|[KMGTPE]i)?$")]
KubernetesName = Annotated[
    str, Field(pattern=r"^[a-z0-9]([a-z0-9-]*[a-z0-9])?(\.[a-z0-9]([a-z0-9-]*[a-z0-9])?)*$")
]
Variable = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]


class KubernetesLauncher(LauncherSettings):
    """Runs a stage as a JobSet on Kubernetes, one pod per node. Pipeline and pods share the store.
    A stage whose pods were evicted, or whose node was lost, goes on from its last checkpoint."""

    several_nodes: ClassVar[bool] = True

    type: Literal["kubernetes"] = "kubernetes"
    """Type of the launcher."""
    image: Annotated[str, Field(pattern=r"^\S+$")]
    """Trainer image of the pods, such as `registry.example.com/rlhf-trainer:1.4`. The pods run the
    same version of this package as the pipeline."""
    context: str | None = None
    """Context of the kubeconfig file ($KUBECONFIG, else ~/.kube/config). Empty: the service account
    of the pod that the pipeline runs in; outside of a cluster the file's current context."""
    namespace: KubernetesName | None = None
    """Namespace of the JobSets. Empty: that of the context, or of the pipeline's own pod."""
    pull_secrets: tuple[KubernetesName, ...] = ()
    """Names of the Secrets with which the image is pulled."""
    service_account: KubernetesName | None = None
    """Service account of the pods. Empty: the namespace's default, without its token."""
    gpus_per_node: Annotated[int, Field(ge=0, le=LARGEST)] | None = None
    """GPUs of each pod. Empty: one per rank, none for stages on the CPU or without ranks."""
    gpu_resource: Annotated[str, Field(pattern=r"^[a-z0-9.-]+/[A-Za-z0-9._-]+$")] = "nvidia.com/gpu"
    """Name of the resource that stands for a GPU, such as `amd.com/gpu`."""
    requests: dict[str, Quantity] = Field(default_factory=dict)
    """Resources that a pod requests, such as `{cpu: 16, memory: 128Gi}`."""
    limits: dict[str, Quantity] = Field(default_factory=dict)
    """Resources that a pod may use at most. GPUs are added to them. What tmpfs holds
    (shared_memory) counts as memory."""
    shared_memory: Quantity = "16Gi"
    """Largest size of /dev/shm, through which the ranks of a node exchange data. It takes memory
    only as it fills."""
    env: dict[Variable, str] = Field(default_factory=dict)
    """Environment variables of the pods, such as `{RLHF_STORE_ENDPOINT: https://s3.example.com}`.
    They can be read in the JobSet: for secrets take `secrets` or `secret_env`."""
    secrets: tuple[KubernetesName, ...] = ()
    """Names of Secrets whose keys become environment variables of the pods."""
    secret_env: dict[Variable, Annotated[str, Field(pattern=r"^[a-z0-9.-]+/[A-Za-z0-9._-]+$")]] = (
        Field(default_factory=dict)
    )
    """Environment variables with the value of one key of a Secret, as SECRET/KEY, such as
    `{HF_TOKEN: hub/token}`."""
    volumes: dict[Annotated[str, Field(pattern=r"^/\S+$")], KubernetesName] = Field(
        default_factory=dict
    )
    """Folders of the pods that are PersistentVolumeClaims: folder -> name of the claim, for a cache
    or a store that is a folder. Several pods mount it, so its access mode is ReadWriteMany.
    /dev/shm and /scratch are each pod's own."""
    node_selector: dict[str, str] = Field(default_factory=dict)
    """Labels that the pods' nodes have."""
    tolerations: tuple[
        Annotated[str, Field(pattern=r"^[^=:\s]+(=[^=:\s]*)?(:[A-Za-z]+)?$")], ...
    ] = ()
    """Taints that the pods tolerate, as `kubectl taint` writes them: KEY, KEY:EFFECT or
    KEY=VALUE:EFFECT, such as `nvidia.com/gpu:NoSchedule`."""
    priority_class: KubernetesName | None = None
    """PriorityClass of the pods."""
    queue: KubernetesName | None = None
    """Kueue's LocalQueue. A JobSet starts when the queue admits it, all of its pods at once. Empty:
    pods start as they find room, which several nodes may never all do on a full cluster."""
    labels: dict[str, str] = Field(default_factory=dict)
    """Further labels of JobSet and pods, such as `{team: alignment}`."""
    annotations: dict[str, str] = Field(default_factory=dict)
    """Further annotations of JobSet and pods."""
    deadline: Annotated[int, Field(ge=60, le=LARGEST)] | None = None
    """Seconds after which one attempt is stopped. The next goes on from its checkpoint; it counts
    as a restart. Empty: no limit."""
    max_restarts: Annotated[int, Field(ge=0, le=LARGEST)] = 10
    """How often one JobSet starts again after a lost node or process, before the stage fails.
    Evictions and preemptions do not count."""
    start_timeout: Annotated[int, Field(ge=10, le=LARGEST)] = 300
    """Seconds after which a stage fails whose image cannot be pulled, or whose Secret, claim or
    service account is missing."""
    queue_timeout: Annotated[int, Field(ge=10, le=LARGEST)] = 604_800
    """Seconds that a JobSet may wait for its queue or for room before the stage fails."""
    keep_finished: Annotated[int, Field(ge=60, le=LARGEST)] = 86_400
    """Seconds after which the cluster deletes a JobSet that has ended, in case the pipeline, which
    does so at once, is gone."""
    poll_seconds: Annotated[float, Field(ge=0.1, le=600)] = 2.0
    """Seconds between two looks at a JobSet. Each is two requests to the API."""

    @field_validator("volumes")
    @classmethod
    def _own_folders_stay(cls, value: dict[str, str]) -> dict[str, str]:
        if taken := sorted({"/dev/shm", "/scratch"} & {path.rstrip("/") for path in value}):
            raise ValueError(f"{taken[0]} is each pod's own: mount the claim at another folder")
        return value


Launcher = LocalLauncher | WorkPoolLauncher | SlurmLauncher | KubernetesLauncher
