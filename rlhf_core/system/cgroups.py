"""The control groups that this process is in: a container's, a service's or a scheduler's limits.

The kernel's documentation: admin-guide/cgroup-v1 and admin-guide/cgroup-v2.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath

PROC, CGROUP = Path("/proc"), Path("/sys/fs/cgroup")


def group_folders(controller: str, proc: Path = PROC, cgroup: Path = CGROUP) -> list[Path]:
    """Folders of this process's group and of those around it, the innermost first.

    A limit of any of them holds. Folders that this process cannot see are left out: in a container
    /proc/self/cgroup may show the host's path, while the container's own group is the mount's root.

    Args:
        controller: of version 1 ("cpu", "memory"); version 2 has one tree for all of them.
    """
    try:
        lines = (proc / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return []
    found: list[Path] = []
    for line in lines:
        number, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            # "cpu,cpuacct" is one mount, as a rule with links named "cpu" and "cpuacct" to it
            roots = dict.fromkeys((cgroup / controllers, cgroup / controller))
        elif number == "0":
            roots = dict.fromkeys((cgroup,))
        else:
            continue
        found += [folder for root in roots for folder in _upwards(root, path) if folder.is_dir()]
    return found


def _upwards(root: Path, path: str) -> Iterator[Path]:
    parts = PurePosixPath(path.lstrip("/")).parts
    if ".." not in parts:  # a group outside of the namespace's root has no folder here
        yield from (root.joinpath(*parts[:depth]) for depth in range(len(parts), 0, -1))
    yield root
