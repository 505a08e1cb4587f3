"""CPU cores from control groups, read from files as the kernel writes them."""

import os
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from rlhf_core.system import cpus
from rlhf_core.system.cgroups import group_folders
from rlhf_core.system.cpus import cpu_cores, limit_threads
from rlhf_core.system.machine import free_memory, memory_limits


@pytest.fixture(autouse=True)
def sixteen_cores(monkeypatch):
    """The test's own machine may have fewer cores than the quotas below."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)))


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def cores(tmp_path: Path, groups: str, files: dict[str, str]) -> int:
    """Cores of a process whose /proc/self/cgroup has these lines."""
    write(tmp_path / "proc/self/cgroup", groups)
    for name, text in files.items():
        write(tmp_path / "cgroup" / name, text)
    return cpu_cores(tmp_path / "proc", tmp_path / "cgroup")


@pytest.mark.parametrize(
    ("quota", "expected"),
    [
        ("max 100000", 16),
        ("400000 100000", 4),
        ("25000 50000", 1),  # half a CPU
        ("150000 100000", 2),  # one and a half, rounded up
        ("200001 100000", 3),
        ("6400000 100000", 16),  # more than the affinity mask
        ("", 16),  # cannot be read
    ],
)
def test_quota_of_version_2(tmp_path, quota, expected):
    assert cores(tmp_path, "0::/\n", {"cpu.max": f"{quota}\n"}) == expected


def test_smallest_quota_of_nested_groups_holds(tmp_path):
    groups = "0::/kubepods/burstable/pod1\n"
    files = {
        "kubepods/cpu.max": "800000 100000\n",
        "kubepods/burstable/cpu.max": "300000 100000\n",
        "kubepods/burstable/pod1/cpu.max": "max 100000\n",
    }
    assert cores(tmp_path, groups, files) == 3


@pytest.mark.parametrize(("quota", "expected"), [("-1", 16), ("250000", 3), ("300000", 3)])
@pytest.mark.parametrize("root", ["cpu", "cpu,cpuacct"])
def test_quota_of_version_1(tmp_path, root, quota, expected):
    groups = "5:memory:/docker/1\n3:cpu,cpuacct:/docker/1\n1:cpuset:/\n0::/\n"
    files = {
        f"{root}/docker/1/cpu.cfs_quota_us": f"{quota}\n",
        f"{root}/docker/1/cpu.cfs_period_us": "100000\n",
    }
    assert cores(tmp_path, groups, files) == expected


def test_container_that_sees_the_hosts_path_reads_its_own_mount(tmp_path):
    assert cores(tmp_path, "0::/system.slice/docker-1.scope\n", {"cpu.max": "200000 100000"}) == 2


def test_group_outside_of_the_namespace_is_not_searched_for(tmp_path):
    write(tmp_path / "cpu.max", "100000 100000\n")  # beside the mount: not a group
    assert cores(tmp_path, "0::/../other\n", {"cpu.max": "200000 100000"}) == 2


def test_machine_without_control_groups_has_its_affinity(tmp_path):
    assert cpu_cores(tmp_path / "proc", tmp_path / "cgroup") == 16
    write(tmp_path / "proc/self/cgroup", "0::/\n")
    assert cpu_cores(tmp_path / "proc", tmp_path / "cgroup") == 16


def test_this_machine_is_read():
    assert 1 <= cpu_cores() <= 16


def test_memory_limits_of_all_groups_are_found(tmp_path):
    write(tmp_path / "proc/self/cgroup", "4:memory:/a\n0::/a/b\n")
    write(tmp_path / "cgroup/a/b/memory.max", "max\n")
    write(tmp_path / "cgroup/a/memory.max", "4096\n")
    write(tmp_path / "cgroup/memory/a/memory.limit_in_bytes", "8192\n")
    assert sorted(memory_limits(tmp_path / "proc", tmp_path / "cgroup")) == [4096, 8192]


@pytest.mark.parametrize(
    ("group", "names"),
    [("cgroup", ("memory.max", "memory.current", "inactive_file")),
     ("cgroup/memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"))],
)  # fmt: skip
def test_free_memory_is_what_the_nearest_limit_leaves(tmp_path, monkeypatch, group, names):
    available = 64 * 2**30
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=available))
    proc, cgroup = tmp_path / "proc", tmp_path / "cgroup"
    assert free_memory(proc, cgroup) == available
    write(proc / "self/cgroup", "4:memory:/a/b\n0::/a/b\n")
    for folder, limit in (("a/b", "max"), ("a", str(8 * 2**30))):
        write(tmp_path / group / folder / names[0], f"{limit}\n")
        write(tmp_path / group / folder / names[1], f"{6 * 2**30}\n")
        write(tmp_path / group / folder / "memory.stat", f"anon 5\n{names[2]} {2**30}\n")
    assert free_memory(proc, cgroup) == 3 * 2**30  # 8 - 6, and files that can go
    write(tmp_path / group / "a" / names[0], f"{2**30}\n")
    assert free_memory(proc, cgroup) == 0


@pytest.mark.parametrize(("quota", "set_before", "expected"), [
    (3, None, "3"), (3, "5", "5"), (16, None, None)])  # fmt: skip
def test_threads_are_limited_by_a_quota_only(monkeypatch, quota, set_before, expected):
    monkeypatch.setattr(cpus, "cpu_cores", lambda: quota)
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    monkeypatch.setenv("OMP_NUM_THREADS", set_before or "")
    if set_before is None:
        monkeypatch.delenv("OMP_NUM_THREADS")
    limit_threads()
    assert os.environ.get("OMP_NUM_THREADS") == expected


def test_groups_are_listed_from_the_innermost(tmp_path):
    write(tmp_path / "proc/self/cgroup", "0::/a/b\n")
    (tmp_path / "cgroup/a/b").mkdir(parents=True)
    folders = group_folders("cpu", tmp_path / "proc", tmp_path / "cgroup")
    assert [str(f.relative_to(tmp_path)) for f in folders] == ["cgroup/a/b", "cgroup/a", "cgroup"]
