"""`rlhf doctor`: this machine, missing packages, and what fits into memory. Imports no torch."""

from __future__ import annotations

import io
import json
import os
import platform
import re
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from importlib import metadata, resources
from pathlib import Path
from typing import Any, Literal

from rlhf_core.errors import ConfigError, ModelError, RLHFError
from rlhf_core.jobs import ModelSettings, PPOSettings, RewardSettings, SFTSettings
from rlhf_core.model_files.shape import read_shape
from rlhf_core.model_files.source_check import model_config
from rlhf_core.preflight.doctor_page import show
from rlhf_core.preflight.doctor_report import Finding, Report
from rlhf_core.preflight.fitting import largest_micro_batch, llama_like, ways_to_train
from rlhf_core.preflight.memory import GIB
from rlhf_core.store import Store, open_store, rlhf_home
from rlhf_core.system.machine import Machine, free_disk, this_machine
from rlhf_core.system.printable import printable

DEFAULT_MODEL = "builtin:smollm2-135m-instruct"
# requirements/USE.txt -> what does not work without it; None: nothing does.
_USES = {
    "run": None,
    "train": None,
    "kubernetes": "`launcher.type: kubernetes`",
    "pages": "`rlhf playground` and `rlhf serve`",
    "demo": f"the model {DEFAULT_MODEL}",
}


@dataclass(frozen=True)
class Question:
    """What to estimate; by default the demo's model on this machine.

    Attributes:
        model: as model.source. parameters: instead of it a llama of this size, such as "7B".
        gpus, gpu_memory: another machine's number of GPUs, and the GiB of each.
        length: tokens of the longest sequence, prompt and reply together.
    """

    model: str | None = None
    parameters: str | None = None
    gpus: int | None = None
    gpu_memory: float | None = None
    length: int = 512


def main(question: Question, as_json: bool = False) -> int:
    """Print the report, or its fields as one JSON object.

    Returns:
        0 if nothing that a run needs is missing, else 1.
    """
    from rich.console import Console

    found = examine(question)
    if as_json:
        print(printable(json.dumps(asdict(found), ensure_ascii=False)))
    else:
        show(found, Console())
    return 0 if found.sound else 1


def report(question: Question | None = None) -> str:
    """The report as text.

    Raises:
        ModelError: see `examine`.
    """
    from rich.console import Console

    console = Console(file=io.StringIO(), width=100, no_color=True)
    show(examine(question), console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().rstrip()


def examine(question: Question | None = None, machine: Machine | None = None) -> Report:
    """Examine the machine, and what fits into its memory or into that which was asked about.

    Raises:
        ModelError: the source is wrong, or its config.json is not on this machine.
        ConfigError: sizes that make no sense.
    """
    question = question or Question()
    here = machine or this_machine()
    elsewhere = question.gpus is not None or question.gpu_memory is not None
    name, config = _model(question)
    try:
        shape = read_shape(config)
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(f"the sizes in {name}'s config.json cannot be read: {error}") from error
    if elsewhere:
        here = _asked_about(question, here)
    device: Literal["cpu", "cuda"] = "cuda" if here.gpus else "cpu"
    ranks = here.gpus or min(2, here.cores)
    available = here.gpu_memory if here.gpus else here.ram // ranks
    fits = {
        title: [
            largest_micro_batch(
                config, settings, ranks, stage, available, way,
                checkpointing=saving, max_length=question.length, device=device,
            )
            for way in ways_to_train(ranks, device)
            for saving in (False, True)
        ]
        for title, stage, settings in (
            ("SFT", "sft", SFTSettings()),
            ("reward", "reward", RewardSettings()),
            ("PPO", "ppo", PPOSettings()),
        )
    }  # fmt: skip
    findings = [] if elsewhere else [*_system(here), *_packages(), _store(), _prefect()]
    return Report(findings, name, shape.parameters, fits, available, device, ranks, question.length)


def _model(question: Question) -> tuple[str, Mapping[str, Any]]:
    """Name and config.json of the model in question."""
    if question.parameters is not None:
        if question.model is not None:
            raise ConfigError(
                f"found a model ({question.model}) and --parameters {question.parameters}; give one"
            )
        return f"a llama of {question.parameters}", llama_like(_count(question.parameters))
    name = question.model or DEFAULT_MODEL
    config = model_config(ModelSettings(source=name), _store_or_none(name))
    if config is None:
        raise ModelError(
            f"{name} is not on this machine, and the memory estimate needs its config.json; run "
            f"`hf download {name} config.json`, give a local folder that has one, or ask for a "
            "llama of a size with --parameters 7B"
        )
    return name, config


def _count(text: str) -> int:
    """Parameters in "135M" or "7B"."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([MB])", text.strip().upper())
    count = float(match[1]) * {"M": 1e6, "B": 1e9}[match[2]] if match else 0
    if not 1e6 <= count <= 1e13:
        raise ConfigError(
            f"--parameters is {text}; expected a number of millions or billions, such as 135M or 7B"
        )
    return int(count)


def _asked_about(question: Question, here: Machine) -> Machine:
    """The machine with other GPUs."""
    memory = here.gpu_memory if question.gpu_memory is None else int(question.gpu_memory * GIB)
    gpus = question.gpus if question.gpus is not None else max(1, here.gpus)
    if not memory:
        raise ConfigError(
            "--gpus was given, and this machine has no GPU whose memory could be taken; give "
            "--gpu-memory too, in GiB, such as 80"
        )
    return replace(here, gpus=gpus, gpu_memory=memory)


# --------------------------------------------------------------------------- findings


def _system(machine: Machine) -> list[Finding]:
    version = platform.python_version()
    known = (3, 11) <= sys.version_info[:2] < (3, 13)
    gpus = (
        f"{machine.gpus} x {machine.gpu_name}, {machine.gpu_memory / GIB:.0f} GiB each, "
        f"at least {machine.gpu_free / GIB:.0f} GiB free"
        if machine.gpus
        else "nvidia-smi shows none; stages run on the CPU"
    )
    home = rlhf_home()
    disk = free_disk(home)
    writable = os.access(_existing(home), os.W_OK)
    return [
        Finding(
            "python",
            "ok" if known else "bad",
            f"{version} at {sys.executable}" + ("" if known else "; expected 3.11 or 3.12"),
        ),
        Finding("torch", *_torch(machine)),
        Finding("GPUs", "ok" if machine.gpus else "note", gpus),
        Finding(
            "CPU and memory",
            "ok" if machine.ram >= 8 * GIB else "note",
            f"{machine.cores} cores, {machine.ram / GIB:.1f} GiB",
        ),
        Finding(
            "home",
            "ok" if writable else "bad",
            f"{home} (RLHF_HOME), {disk / GIB:.1f} GiB free"
            + ("" if writable else "; not writable: set RLHF_HOME to a folder that is"),
        ),
    ]


def _existing(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path


def _torch(machine: Machine) -> tuple[Literal["ok", "note", "bad"], str]:
    try:
        version = metadata.version("torch")
    except metadata.PackageNotFoundError:
        return "bad", "not installed; run: pip install -r requirements/torch.txt"
    if machine.gpus and version.endswith("+cpu"):
        return "bad", f"{version} is a CPU build on a machine with GPUs; install a CUDA build"
    return "ok", version


def requirements_folder() -> Path | None:
    """requirements/ of the checkout, None if the project was installed as a package."""
    path = Path(str(resources.files("rlhf_core"))).parent / "requirements"
    return path if (path / "run.txt").is_file() else None


def compare_pins(text: str) -> tuple[list[str], list[str]]:
    """Packages of a requirement file that are missing, and those of another version than pinned."""
    missing, differing = [], []
    for line in text.splitlines():
        match = re.match(r"([A-Za-z0-9][\w.-]*)==(\S+)", line.partition("#")[0].strip())
        if match is None:
            continue
        name, wanted = match[1], match[2]
        try:
            found = metadata.version(name)
        except metadata.PackageNotFoundError:
            missing.append(f"{name}=={wanted}")
            continue
        if found.partition("+")[0] != wanted.partition("+")[0]:
            differing.append(f"{name} {found} (pinned {wanted})")
    return missing, differing


def _packages() -> list[Finding]:
    folder = requirements_folder()
    if folder is None:
        return [Finding("packages", "note", "there is no requirements/ to compare with")]
    findings = []
    for use, purpose in _USES.items():
        path = folder / f"{use}.txt"
        missing, differing = compare_pins(path.read_text())
        install = f"run: pip install --no-deps -r {path}"
        if missing and purpose is None:
            findings.append(Finding("packages", "bad", f"missing {_few(missing)}; {install}"))
        elif missing:
            text = f"missing {_few(missing)}, which {purpose} needs; {install}"
            findings.append(Finding("packages", "note", text))
        if differing:
            text = f"not the tested versions: {_few(differing)}; {install}"
            findings.append(Finding("packages", "note", text))
    return findings or [Finding("packages", "ok", "as requirements/ pins them")]


def _few(names: list[str]) -> str:
    more = f" and {len(names) - 6} more" if len(names) > 6 else ""
    return ", ".join(names[:6]) + more


def _store() -> Finding:
    try:
        store = open_store()
        store.check()
    except RLHFError as error:
        return Finding("store", "bad", str(error))
    return Finding("store", "ok", f"{store.url} can be read and written")


def _store_or_none(source: str) -> Store | None:
    if not source.startswith("artifact:"):
        return None
    return open_store()


def _prefect() -> Finding:
    """The Prefect server at PREFECT_API_URL."""
    import urllib.request

    url = os.environ.get("PREFECT_API_URL", "")
    if not url:
        return Finding(
            "Prefect", "note", "PREFECT_API_URL is not set; a run starts a temporary server"
        )
    shown = re.sub(r"//[^/@]*@", "//", url)
    try:
        with urllib.request.urlopen(f"{url.rstrip('/')}/health", timeout=5) as reply:
            healthy = reply.status == 200
    except (OSError, ValueError) as error:
        return Finding(
            "Prefect",
            "bad",
            f"no server answers at {shown} ({error}); start it with `prefect server start`, or "
            "unset PREFECT_API_URL",
        )
    return Finding("Prefect", "ok" if healthy else "bad", f"server at {shown}")
