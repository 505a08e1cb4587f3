"""What the kernel says about memory, from files as it writes them."""

import subprocess
import sys

from rlhf_core.system.host_memory import format_bytes, oom_kills, resident_peak


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_own_control_group_counts_version_2(tmp_path):
    write(tmp_path / "proc/self/cgroup", "0::/user.slice/job\n")
    write(tmp_path / "proc/vmstat", "oom_kill 7\n")
    events = tmp_path / "cgroup/user.slice/job/memory.events"
    write(events, "low 0\nhigh 0\noom 3\noom_kill 2\noom_group_kill 0\n")
    assert oom_kills(tmp_path / "proc", tmp_path / "cgroup") == {str(events): 2}


def test_own_control_group_counts_version_1(tmp_path):
    write(tmp_path / "proc/self/cgroup", "4:cpu,memory:/docker/1\n0::/\n")
    control = tmp_path / "cgroup/memory/docker/1/memory.oom_control"
    write(control, "oom_kill_disable 0\nunder_oom 0\noom_kill 5\n")
    assert oom_kills(tmp_path / "proc", tmp_path / "cgroup") == {str(control): 5}


def test_machine_counts_where_the_group_does_not(tmp_path):
    write(tmp_path / "proc/self/cgroup", "0::/\n")
    write(tmp_path / "proc/vmstat", "pgfault 1\noom_kill 7\n")
    found = oom_kills(tmp_path / "proc", tmp_path / "cgroup")
    assert list(found.values()) == [7]
    assert oom_kills(tmp_path / "nothing", tmp_path / "nothing") == {}


def test_peak_of_a_process_grows_with_what_it_holds():
    code = """import sys
x = bytearray(b"x") * int(sys.argv[1])
print(len(x), flush=True)
sys.stdin.read()"""
    peaks = []
    for size in (2**20, 2**26):
        with subprocess.Popen(
            [sys.executable, "-c", code, str(size)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as process:
            assert int(process.stdout.readline()) == size
            peaks.append(resident_peak(process.pid))
            process.stdin.close()
    assert 2**25 < peaks[1] - peaks[0] < 2**27
    assert resident_peak(2**22 + 1) == 0  # there is no such process


def test_amounts_are_readable():
    assert [format_bytes(x) for x in (3 * 2**29, 5 * 2**20)] == ["1.50 GiB", "5 MiB"]
