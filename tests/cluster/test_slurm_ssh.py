"""The slurm launcher through ssh: a real sshd on this machine is the login node."""

import getpass
import os
import shutil
import socket
import subprocess
import time

import pytest

from tasks.launchers.slurm.shell import Shell, Unreachable

pytestmark = [pytest.mark.cluster, pytest.mark.slow]


@pytest.fixture
def login(tmp_path, monkeypatch):
    """Name of a login node in a user's ssh configuration; `ssh` on PATH reads that one."""
    sshd = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin")
    if sshd is None or shutil.which("ssh") is None:
        pytest.skip("no command sshd (Debian: openssh-server)")
    for name in ("host", "user"):
        subprocess.run(
            ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(tmp_path / name)], check=True
        )
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    (tmp_path / "sshd.conf").write_text(
        f"Port {port}\nListenAddress 127.0.0.1\nHostKey {tmp_path}/host\nPidFile none\n"
        f"AuthorizedKeysFile {tmp_path}/user.pub\nStrictModes no\nPermitRootLogin yes\n"
        "PasswordAuthentication no\nUsePAM no\n"
    )
    (tmp_path / "config").write_text(
        f"Host login\n  HostName 127.0.0.1\n  Port {port}\n  User {getpass.getuser()}\n"
        f"  IdentityFile {tmp_path}/user\n  IdentitiesOnly yes\n  StrictHostKeyChecking no\n"
        f"  UserKnownHostsFile {tmp_path}/known\n  LogLevel ERROR\n"
    )
    commands = tmp_path / "bin"
    commands.mkdir()
    real = shutil.which("ssh")
    (commands / "ssh").write_text(f'#!/bin/sh\nexec {real} -F {tmp_path}/config "$@"\n')
    (commands / "ssh").chmod(0o755)
    monkeypatch.setenv("PATH", f"{commands}:{os.environ['PATH']}")
    if os.geteuid() == 0:
        os.makedirs("/run/sshd", exist_ok=True)  # where sshd gives up its rights
    server = subprocess.Popen([sshd, "-D", "-f", str(tmp_path / "sshd.conf")])
    try:
        yield "login"
    finally:
        subprocess.run(["ssh", "-O", "exit", *Shell("login")._command[1:-3], "login"],
                       capture_output=True)  # fmt: skip
        server.terminate()
        server.wait(20)


def answered(shell, script):
    """The output of a script, asked again until sshd listens."""
    for _ in range(60):
        try:
            return shell.run(script)
        except Unreachable as error:
            last = error
            time.sleep(0.5)
    raise last


def test_scripts_run_in_a_login_shell_over_one_shared_connection(login):
    shell = Shell(login)
    first = answered(shell, 'echo "$SSH_CONNECTION"; shopt -q login_shell && echo login; exit 3')
    connection, kind = first.text.splitlines()
    assert (first.code, kind) == (3, "login")
    assert shell.run('echo "$SSH_CONNECTION"').text.strip() == connection
    # no variable of this process goes there by itself, and none is in an argument
    secret = shell.run("export AWS_SECRET_ACCESS_KEY='a b'\necho \"$AWS_SECRET_ACCESS_KEY\"")
    assert secret.text == "a b\n"


def test_host_that_does_not_answer_is_told_from_a_command_that_fails(login):
    assert answered(Shell(login), "false").code == 1
    with pytest.raises(Unreachable, match="nowhere"):
        Shell("nowhere.invalid").run("true")
