"""The memory of the machine at hand that a process can still take."""

from __future__ import annotations

import os
import re
from pathlib import Path

PROC = Path("/proc")
CGROUPS = {
    "": (Path("/sys/fs/cgroup"), "memory.max", "memory.current", "inactive_file"),
    "memory": (
        Path("/sys/fs/cgroup/memory"),
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        "total_inactive_file",
    ),
}
"""Limit, use and reclaimable file cache of a control group's memory, by the controller's name in versions 2 and 1."""


def available_host_bytes() -> int:
    """Memory that this process can still take: what the system calls available, or less within a container's
    or a batch job's limit."""
    free = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    if found := re.search(r"^MemAvailable:\s+(\d+) kB", _read(PROC / "meminfo") or "", re.MULTILINE):
        free.append(int(found[1]) * 1024)
    lines = (line.split(":", 2) for line in (_read(PROC / "self" / "cgroup") or "").splitlines())
    groups = {name: path for _, names, path in lines for name in names.split(",")}
    for name, (root, limit, used, cache) in CGROUPS.items():
        # A limit holds for all groups below. A container sees its own group as the root, whatever it is
        # called outside.
        group = root / groups.get(name, "/").removeprefix("/")
        for folder in (group, *group.parents):
            allowed, taken, statistics = (_read(folder / file) for file in (limit, used, "memory.stat"))
            if allowed and taken and allowed.strip().isdecimal():
                reclaimable = re.search(rf"^{cache} (\d+)", statistics or "", re.MULTILINE)
                free.append(max(0, int(allowed) - int(taken) + int(reclaimable[1] if reclaimable else 0)))
    return min(free)


def _read(path: Path) -> str | None:
    try:
        return path.read_text()
    except OSError:
        return None
