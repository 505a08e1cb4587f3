"""Logs of a system: bounded, private, and whole while somebody writes."""

import resource
import stat
import subprocess
import sys

import pytest

from flows.cli.log_files import open_log, rotate

WRITER = "import sys\nfor i in range(60_000): print(i, flush=True)"


def test_log_stays_bounded_and_its_newest_lines_are_kept(tmp_path):
    log = tmp_path / "server.log"
    for round in range(7):
        with open_log(log) as file:
            file.write(b"%d" % round * 60)
        rotate(tmp_path, limit=100, kept=2)
    kept = {path.name: path.read_bytes()[:1] for path in tmp_path.iterdir()}
    assert kept == {"server.log": b"6", "server.log.1": b"4", "server.log.2": b"2"}
    assert {path.stat().st_size for path in tmp_path.iterdir()} <= {60, 120}
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {0o600}


def test_writer_goes_on_where_its_file_was_truncated(tmp_path):
    log = tmp_path / "server.log"
    with open_log(log) as file:
        writer = subprocess.Popen([sys.executable, "-c", WRITER], stdout=file)
    while writer.poll() is None:
        rotate(tmp_path, limit=20_000, kept=1000)
    parts = sorted(tmp_path.glob("*.log.*"), key=lambda p: -int(p.name.rpartition(".")[2]))
    text = b"".join(p.read_bytes() for p in (*parts, log))
    assert len(parts) > 2 and text.endswith(b"\n59999\n")
    assert b"\0" not in text, "a hole: the writer does not append"
    assert len(text.split()) > 30_000, "what is written at a moment of truncation may be lost"


def test_full_disk_loses_nothing(tmp_path):
    for name, content in (("a.log", b"new" * 50), ("a.log.1", b"old")):
        (tmp_path / name).write_bytes(content)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))  # the copy cannot be whole
    try:
        with pytest.raises(OSError, match="File too large"):
            rotate(tmp_path, limit=100, kept=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / "a.log").read_bytes() == b"new" * 50
    assert (tmp_path / "a.log.1").read_bytes() == b"old"
