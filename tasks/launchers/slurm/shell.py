"""Runs shell commands where Slurm's commands are: on this machine, or on a login node by ssh.

ssh is the system's OpenSSH client, not a library: so the user's ~/.ssh/config, agent, jump hosts,
certificates, Kerberos tickets and one-time passwords work as in a terminal. One connection is kept
open and shared (ControlMaster); one that the user has opened with an own ControlPath is used.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cached_property

from rlhf_core.errors import ConfigError

BEGIN = b"rlhf-begin\n"  # what a login shell prints before it is no output of the commands
NO_CONNECTION = 255  # exit code of ssh's own failures
# Of a pipeline's environment, these are not for its jobs: variables of an allocation that it runs
# in, and those that replace options of `sbatch` (SBATCH_PARTITION and the like).
DROPPED = ("SLURM_", "SBATCH_", "SRUN_", "SALLOC_", "PREFECT_")
KEPT = ("SLURM_CONF",)


@dataclass(frozen=True)
class Output:
    """What commands printed, and the exit code of the last one."""

    code: int
    stdout: bytes
    stderr: str

    @property
    def text(self) -> str:
        return self.stdout.decode("utf-8", "replace")


class Unreachable(Exception):
    """The login node, or Slurm's controller, does not answer. Passing, as a rule."""


class Shell:
    """Runs scripts in bash."""

    def __init__(self, host: str | None = None) -> None:
        """Args:
        host: as ssh names it; None: this machine.
        """
        self.host = host

    def run(self, script: str, timeout: float = 120.0) -> Output:
        """Run a script of bash, which gets no input of its own.

        The script, with secrets it may set, is sent as standard input: arguments of a process can
        be read by everybody on its machine.

        Raises:
            Unreachable: no connection, or no answer in time.
            ConfigError: there is no bash or ssh.
        """
        text = f"printf 'rlhf-begin\\n'\n{{\n{script}\n}} </dev/null\n"
        try:
            done = subprocess.run(
                self._command, input=text.encode(), capture_output=True, timeout=timeout,
                env=_environment() if self.host is None else None,
            )  # fmt: skip
        except subprocess.TimeoutExpired as error:
            raise Unreachable(f"{self._place} gave no answer within {timeout:.0f} s") from error
        except FileNotFoundError as error:
            raise ConfigError(
                f"the command {self._command[0]} is not installed on this machine, and "
                "launcher.type slurm needs it: install it (for ssh: the package openssh-client)"
            ) from error
        stderr = done.stderr.decode("utf-8", "replace").strip()
        if self.host is not None and done.returncode == NO_CONNECTION:
            raise Unreachable(f"ssh {self.host}: {stderr[-500:] or 'the connection failed'}")
        _, _, stdout = done.stdout.partition(BEGIN)
        return Output(done.returncode, stdout, stderr)

    @property
    def _place(self) -> str:
        return self.host or "this machine"

    @cached_property
    def _command(self) -> list[str]:
        if self.host is None:
            return ["bash", "-s"]
        options = ["BatchMode=yes", "ConnectTimeout=20", "ServerAliveInterval=15", *self._sharing()]
        # a login shell: clusters put Slurm's commands into PATH in /etc/profile.d
        return ["ssh", *(f"-o{option}" for option in options), self.host, "bash", "-ls"]

    def _sharing(self) -> list[str]:
        """Options that share one connection, unless the user's configuration does so."""
        assert self.host is not None
        if shutil.which("ssh") is None:
            return []
        shown = subprocess.run(["ssh", "-G", self.host], capture_output=True, text=True).stdout
        paths = [line.split(maxsplit=1)[1] for line in shown.splitlines()
                 if line.startswith("controlpath ")]  # fmt: skip
        if paths and paths[0] != "none":
            return []
        # short: the path of a socket has at most 108 characters
        folder = os.path.join(tempfile.gettempdir(), f"rlhf-ssh-{os.getuid()}")
        os.makedirs(folder, mode=0o700, exist_ok=True)
        if os.stat(folder).st_uid != os.getuid():
            return []
        return ["ControlMaster=auto", f"ControlPath={folder}/%C", "ControlPersist=300"]


def _environment() -> dict[str, str]:
    return {
        name: value
        for name, value in os.environ.items()
        if name in KEPT or not name.startswith(DROPPED)
    }
