"""Memory that a process can still take."""

import os

import pytest

from repro_tools.memory import host

V2 = {"memory.max": "1000\n", "memory.current": "600\n", "memory.stat": "anon 300\ninactive_file 200\nfile 9\n"}
V1 = {
    "memory.limit_in_bytes": "1000\n",
    "memory.usage_in_bytes": "600\n",
    "memory.stat": "inactive_file 1\ntotal_inactive_file 200\n",
}
UNLIMITED_V1 = V1 | {"memory.limit_in_bytes": "9223372036854771712\n"}


@pytest.fixture
def system(monkeypatch, tmp_path):
    """Writes the files in which Linux says how much memory there is: /proc and the control groups in both versions."""
    roots = {"": tmp_path / "v2", "memory": tmp_path / "v1"}
    monkeypatch.setattr(host, "PROC", tmp_path / "proc")
    monkeypatch.setattr(host, "CGROUPS", {name: (roots[name], *rest) for name, (_, *rest) in host.CGROUPS.items()})

    def write(files):
        for name, text in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

    return write


def group(folder, files):
    return {f"{folder}/{name}": text for name, text in files.items()}


MEMINFO = {"proc/meminfo": "MemTotal:  9 kB\nMemFree:  1 kB\nMemAvailable:     5 kB\n"}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (MEMINFO, 5 * 1024),
        (MEMINFO | group("v2", V2), 1000 - 600 + 200),
        (MEMINFO | group("v2", V2 | {"memory.max": "max\n"}), 5 * 1024),
        (MEMINFO | group("v2", V2 | {"memory.max": "9000\n"}), 5 * 1024),
        (MEMINFO | group("v2", V2 | {"memory.current": "1500\n"}), 0),
        (MEMINFO | group("v2", {name: V2[name] for name in ("memory.max", "memory.current")}), 1000 - 600),
        (MEMINFO | group("v1", V1), 1000 - 600 + 200),
        (MEMINFO | group("v1", UNLIMITED_V1), 5 * 1024),
        (MEMINFO | {"proc/self/cgroup": "0::/job/step\n"} | group("v2/job/step", V2), 600),
        (MEMINFO | {"proc/self/cgroup": "0::/job/step\n"} | group("v2/job", V2), 600),
        (MEMINFO | {"proc/self/cgroup": "3:cpu,memory:/a\n"} | group("v1/a", V1) | group("v1", UNLIMITED_V1), 600),
        (MEMINFO | {"proc/self/cgroup": "0::/docker/1f\n"} | group("v2", V2), 600),
        (MEMINFO | {"proc/self/cgroup": "0::/other\n"} | group("v2/job", V2), 5 * 1024),
    ],
    ids=["no limit", "v2", "v2 without", "v2 above the memory", "v2 exceeded", "v2 without statistics", "v1",
         "v1 without", "own group", "group above", "v1 own group", "container without a name space", "group of others"],
)  # fmt: skip
def test_available_memory_is_the_least_of_what_is_free_and_every_limit(system, files, expected):
    system(files)
    assert host.available_host_bytes() == expected


def test_without_linux_available_memory_is_all_there_is(system):
    assert host.available_host_bytes() == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
