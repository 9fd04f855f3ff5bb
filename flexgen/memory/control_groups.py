"""The control groups of this process (cgroups, version 1 and 2), whose limits apply in addition to the machine's."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path


def control_groups(controller: str, root: Path = Path("/")) -> Iterator[tuple[Path, int]]:
    """The folders that may limit a resource of this process, with the version of their files.

    controller: the name of the resource in version 1, such as "memory". The parent groups are included, because some
    systems set limits only there. A folder may be missing: in a container, often only the top folder is visible, and
    has the limit of the container.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:  # not on Linux
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            top, version = "sys/fs/cgroup", 2
        elif controller in controllers.split(","):
            top, version = f"sys/fs/cgroup/{controller}", 1
        else:
            continue
        own = root / (top + path)
        for folder in (own, *own.parents):
            yield folder, version
