"""What the kernel says about memory, from files as it writes them."""

import os

from rlhf_core.host_memory import amount, oom_kills, resident_peak


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
    before = resident_peak(os.getpid())
    held = bytearray(os.urandom(2**20)) * 64
    assert resident_peak(os.getpid()) >= before + 2**25
    assert len(held) == 2**26
    assert resident_peak(2**22 + 1) == 0  # there is no such process


def test_amounts_are_readable():
    assert [amount(x) for x in (3 * 2**29, 5 * 2**20)] == ["1.50 GiB", "5 MiB"]
