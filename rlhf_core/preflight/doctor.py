"""`rlhf doctor`: this machine, missing packages, and memory per strategy. Does not import torch."""

from __future__ import annotations

import io
import os
import platform
import re
import sys
from dataclasses import dataclass
from importlib import metadata, resources
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from rlhf_core.errors import ModelError, RLHFError
from rlhf_core.jobs import ModelSettings, PPOSettings, Resources, RewardSettings, SFTSettings
from rlhf_core.model_files.shape import read_shape
from rlhf_core.model_files.source_check import model_config
from rlhf_core.preflight.memory import GIB, MemoryEstimate, per_strategy
from rlhf_core.store import Store, open_store, rlhf_home
from rlhf_core.system.machine import Machine, free_disk, this_machine

if TYPE_CHECKING:
    from rich.console import Console

DEFAULT_MODEL = "builtin:smollm2-135m-instruct"
# requirements/USE.txt -> what does not work without it; None: nothing does.
_USES = {
    "run": None,
    "train": None,
    "pages": "`rlhf playground` and `rlhf serve`",
    "demo": f"the model {DEFAULT_MODEL}",
}


@dataclass(frozen=True)
class Finding:
    """One line of the report. A "bad" finding makes the exit code 1."""

    subject: str
    state: Literal["ok", "note", "bad"]
    text: str


@dataclass(frozen=True)
class Report:
    """All findings, and the model's memory: stage -> strategy -> estimate (bytes per rank)."""

    findings: list[Finding]
    model: str
    parameters: int
    memory: dict[str, dict[str, MemoryEstimate]]
    available: int
    device: Literal["cpu", "cuda"]
    ranks: int

    @property
    def sound(self) -> bool:
        return all(finding.state != "bad" for finding in self.findings)


def main(model: str | None = None) -> int:
    """Print the report.

    Returns:
        0 if nothing that a run needs is missing, else 1.
    """
    from rich.console import Console

    found = examine(model)
    _print(found, Console())
    return 0 if found.sound else 1


def report(model: str | None = None) -> str:
    """The report as text.

    Raises:
        ModelError: see `examine`.
    """
    from rich.console import Console

    console = Console(file=io.StringIO(), width=100, no_color=True)
    _print(examine(model), console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().rstrip()


def examine(model: str | None = None, machine: Machine | None = None) -> Report:
    """Examine the machine, and estimate the memory for training a model on it.

    Args:
        model: as model.source; None: the demo's model.

    Raises:
        ModelError: the source is wrong, or its config.json is not on this machine.
    """
    machine = machine or this_machine()
    name = model or DEFAULT_MODEL
    config = model_config(ModelSettings(source=name), _store_or_none(name))
    if config is None:
        raise ModelError(
            f"{name} is not on this machine, and the memory estimate needs its config.json; run "
            f"`hf download {name} config.json`, or give a local folder"
        )
    try:
        shape = read_shape(config)
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(f"the sizes in {name}'s config.json cannot be read: {error}") from error
    device: Literal["cpu", "cuda"] = "cuda" if machine.gpus else "cpu"
    ranks = machine.gpus or min(2, machine.cores)
    place = Resources(ranks=ranks)
    memory = {
        "SFT": per_strategy(config, SFTSettings(), place, "sft", device=device),
        "reward": per_strategy(config, RewardSettings(), place, "reward", device=device),
        "PPO": per_strategy(config, PPOSettings(), place, "ppo", device=device),
    }
    available = machine.gpu_memory if machine.gpus else machine.ram // ranks
    findings = [*_system(machine), *_packages(), _store(), _prefect()]
    return Report(findings, name, shape.parameters, memory, available, device, ranks)


# --------------------------------------------------------------------------- findings


def _system(machine: Machine) -> list[Finding]:
    version = platform.python_version()
    known = (3, 11) <= sys.version_info[:2] < (3, 13)
    gpus = (
        f"{machine.gpus} x {machine.gpu_name}, {machine.gpu_memory / GIB:.0f} GiB each, "
        f"at least {machine.gpu_free / GIB:.0f} GiB free"
        if machine.gpus
        else "nvidia-smi shows none; stages run on the CPU (ddp, zero1, zero2)"
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


# --------------------------------------------------------------------------- printing


def _print(found: Report, console: Console) -> None:
    from rich.table import Table

    marks = {"ok": "[green]ok[/]", "note": "[yellow]note[/]", "bad": "[red]BAD[/]"}
    table = Table(show_header=False, box=None, pad_edge=False)
    for finding in found.findings:
        table.add_row(marks[finding.state], finding.subject, _plain(finding.text))
    console.print(table)
    ranks = f"{found.ranks} rank{'s' if found.ranks > 1 else ''}"
    where = "GPU" if found.device == "cuda" else "CPU"
    console.print(
        f"\nMemory per rank for {_plain(found.model)} ({found.parameters:,} parameters) on "
        f"{ranks}, {where}, in GiB;\neach rank has {found.available / GIB:.1f}. bf16, micro-batch "
        "8, 512 tokens, all layers trained.\nEstimates, not measurements.",
        highlight=False,
        soft_wrap=True,
    )
    sizes = Table("strategy", *found.memory)
    for strategy in next(iter(found.memory.values())):
        row = [strategy]
        for stage in found.memory.values():
            total = stage[strategy].total
            color, verdict = ("green", "fits") if total <= found.available else ("red", "too large")
            row.append(f"[{color}]{total / GIB:6.1f}  {verdict}[/]")
        sizes.add_row(*row)
    console.print(sizes)


def _plain(text: str) -> str:
    from rich.markup import escape

    return escape(text)
