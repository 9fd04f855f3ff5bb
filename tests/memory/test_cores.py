"""The cores that a process may use, of machines that are folders with the files of /proc and /sys."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch

from flexgen.memory import cores
from flexgen.memory.cores import Cores, thread_counts, usable_cores, use_one_thread_per_core

Machine = Callable[[Mapping[str, object]], Path]


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    """`machine({path: text})`: a root folder with these files."""

    def write(texts: Mapping[str, object]) -> Path:
        for path, text in texts.items():
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).write_text(f"{text}\n")
        return tmp_path

    return write


def processors(
    cores: int, per_core: int = 1, nodes: int = 1, name: str = "core_cpus_list"
) -> dict[str, object]:
    """Numbered as Linux does: the first hardware threads of all cores, then the second ones."""
    files: dict[str, object] = {}
    members: dict[int, list[int]] = {node: [] for node in range(nodes)}
    for core in range(cores):
        own = [core + cores * n for n in range(per_core)]
        members[core * nodes // cores] += own
        for cpu in own:
            files[f"sys/devices/system/cpu/cpu{cpu}/topology/{name}"] = ",".join(map(str, own))
    for node, cpus in members.items():
        files[f"sys/devices/system/node/node{node}/cpulist"] = ",".join(map(str, sorted(cpus)))
    return files


def found(root: Path, cpus: int | range | list[int]) -> Cores:
    return usable_cores(root, frozenset(range(cpus) if isinstance(cpus, int) else cpus))


@pytest.mark.parametrize("name", ["core_cpus_list", "thread_siblings_list"])
def test_hardware_threads_of_a_core_count_once(machine: Machine, name: str) -> None:
    root = machine(processors(8, per_core=2, name=name))
    assert found(root, 16) == Cores(cpus=16, cores=8, nodes=(0,))
    assert found(root, 16).threads == 8


def test_the_affinity_of_the_process_limits_the_cores(machine: Machine) -> None:
    root = machine(processors(8, per_core=2))
    assert found(root, [0, 1, 8, 9]) == Cores(4, 2, (0,))  # two whole cores
    assert found(root, [0, 1, 2, 3]) == Cores(4, 4, (0,))  # one hardware thread of each of four


def test_numa_nodes_are_those_of_the_cores(machine: Machine) -> None:
    root = machine(processors(8, per_core=2, nodes=2))
    assert found(root, 16) == Cores(16, 8, (0, 1))
    assert found(root, [4, 5, 12, 13]) == Cores(4, 2, (1,))


def test_nodes_whose_memory_is_not_allowed_do_not_count(machine: Machine) -> None:
    status = "Name:\tpython\nCpus_allowed_list:\t0-7\nMems_allowed:\t1\nMems_allowed_list:\t0\n"
    root = machine({**processors(8, nodes=2), "proc/self/status": status})
    assert found(root, 8).nodes == (0,)


def test_ranges_are_read_like_lists(machine: Machine) -> None:
    root = machine(
        {
            **{
                f"sys/devices/system/cpu/cpu{n}/topology/core_cpus_list": f"{n // 2 * 2}-{n // 2 * 2 + 1}"
                for n in range(6)
            },
            "sys/devices/system/node/node0/cpulist": "0-1,4-5",
            "sys/devices/system/node/node1/cpulist": "2-3",
            "sys/devices/system/node/node2/cpulist": "",
        }
    )
    assert found(root, 6) == Cores(6, 3, (0, 1))


@pytest.mark.parametrize(
    ("quota", "expected", "threads"),
    [
        ("max 100000", None, 8),
        ("350000 100000", 3.5, 3),
        ("50000 100000", 0.5, 1),
        ("9900000 100000", 99.0, 8),
    ],
)
def test_a_quota_of_the_control_group_limits_the_threads(
    machine: Machine, quota: str, expected: float | None, threads: int
) -> None:
    files = {"proc/self/cgroup": "0::/job/step", "sys/fs/cgroup/job/cpu.max": quota}
    cores = found(machine({**processors(8), **files}), 8)
    assert (cores.quota, cores.threads, cores.cores) == (expected, threads, 8)


def test_the_smallest_quota_of_all_parents_counts(machine: Machine) -> None:
    files = {
        "proc/self/cgroup": "0::/job/step",
        "sys/fs/cgroup/job/step/cpu.max": "max 100000",
        "sys/fs/cgroup/job/cpu.max": "200000 100000",
        "sys/fs/cgroup/cpu.max": "400000 100000",
    }
    assert found(machine({**processors(8), **files}), 8).quota == 2


def test_the_first_version_of_control_groups(machine: Machine) -> None:
    folder = "sys/fs/cgroup/cpu/job"
    files: dict[str, object] = {"proc/self/cgroup": "4:memory:/m\n3:cpu:/job\n0::/"}
    files |= {f"{folder}/cpu.cfs_quota_us": 150_000, f"{folder}/cpu.cfs_period_us": 50_000}
    assert found(machine({**processors(8), **files}), 8).quota == 3
    machine({f"{folder}/cpu.cfs_quota_us": -1})
    assert found(machine({}), 8).quota is None


@pytest.mark.parametrize("damage", ["", "a-b", "3-", "?"])
def test_what_the_system_does_not_tell_counts_as_plain_cores(machine: Machine, damage: str) -> None:
    assert found(machine({}), 4) == Cores(4, 4, (0,))
    files = dict.fromkeys(processors(4, per_core=1, nodes=2), damage)
    root = machine({**files, "proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": damage})
    assert found(root, 4) == Cores(4, 4, (0,))


def test_this_machine() -> None:
    here = usable_cores()
    assert here.cpus == len(os.sched_getaffinity(0)) >= here.cores >= here.threads >= 1
    counts = thread_counts(disk=6)
    assert counts.compute == torch.get_num_threads() and counts.cores == here.cores


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of threads of torch, last."""
    numbers = [8]
    monkeypatch.setattr(torch, "get_num_threads", lambda: numbers[-1])
    monkeypatch.setattr(torch, "set_num_threads", numbers.append)
    monkeypatch.setattr(cores, "_DEFAULT", 8)
    for name in cores._CHOSEN_BY:
        monkeypatch.delenv(name, raising=False)
    return numbers


@pytest.fixture
def eight_threads_of_four_cores(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    root = machine(processors(4, per_core=2))
    monkeypatch.setattr(cores, "usable_cores", lambda: found(root, 8))


@pytest.mark.usefixtures("eight_threads_of_four_cores")
class TestTheNumberOfThreads:
    def test_is_one_for_each_core(self, counted: list[int]) -> None:
        for _ in range(2):
            use_one_thread_per_core()
        assert counted == [8, 4]

    @pytest.mark.parametrize("name", cores._CHOSEN_BY)
    def test_is_that_of_the_environment(
        self, counted: list[int], monkeypatch: pytest.MonkeyPatch, name: str
    ) -> None:
        monkeypatch.setenv(name, "8")
        use_one_thread_per_core()
        assert counted == [8]

    @pytest.mark.parametrize("number", [1, 6, 16])
    def test_is_that_of_the_caller(self, counted: list[int], number: int) -> None:
        torch.set_num_threads(number)
        use_one_thread_per_core()
        assert counted == [8, number]

    def test_is_never_raised(self, counted: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(cores, "_DEFAULT", 2)
        counted.append(2)
        use_one_thread_per_core()
        assert counted == [8, 2]


@pytest.mark.slow
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="there is one hardware thread only")
def test_a_process_that_is_restricted_to_one_core_computes_with_one_thread() -> None:
    """`taskset` after torch was imported, as a scheduler of a cluster may do it."""
    code = """
import os, torch
import flexgen.memory.cores as cores
before = torch.get_num_threads()
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
cores.use_one_thread_per_core()
print(before, torch.get_num_threads())
"""
    env = {name: value for name, value in os.environ.items() if name not in cores._CHOSEN_BY}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=env)
    assert done.returncode == 0, done.stderr
    before, after = map(int, done.stdout.split())
    assert before > 1 == after
