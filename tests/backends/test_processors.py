"""How many threads are taken when none are asked for, on made-up machines."""

from __future__ import annotations

from pathlib import Path

import pytest

from octavo.backends.processors import available_processors, cpu_quota


def machine(folder: Path, siblings: list[str], name: str = "core_cpus_list") -> Path:
    """Processor i is on the core whose processors are siblings[i]."""
    for i, text in enumerate(siblings):
        topology = folder / "system" / f"cpu{i}" / "topology"
        topology.mkdir(parents=True)
        (topology / name).write_text(text + "\n")
    return folder / "system"


def group(folder: Path, files: dict[str, str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text + "\n")


@pytest.mark.parametrize("name", ["core_cpus_list", "thread_siblings_list"])  # the second on kernels before 5.3
def test_threads_of_one_core_count_once(tmp_path: Path, name: str) -> None:
    system = machine(tmp_path, ["0,4", "1,5", "2", "3", "0,4", "1,5"], name)
    none = tmp_path / "none"
    for allowed, cores in (({0, 1, 2, 3, 4, 5}, 4), ({0, 4}, 1), ({4, 5}, 2), ({2}, 1)):
        assert available_processors(system, none, none, allowed) == cores
    assert available_processors(none, none, none, {0, 1, 7}) == 3  # nothing is known of the cores


@pytest.mark.parametrize(
    ("own", "files", "quota"),
    [
        ("0::/", {"": {"cpu.max": "150000 100000"}}, 1.5),  # inside a container
        ("0::/", {"": {"cpu.max": "max 100000"}}, None),
        ("0::/a/b", {"a/b": {"cpu.max": "max 100000"}, "a": {"cpu.max": "300000 100000"}}, 3.0),
        ("0::/a/b", {"a/b": {"cpu.max": "50000 100000"}, "a": {"cpu.max": "300000 100000"}}, 0.5),
        ("0::/of/the/host", {"": {"cpu.max": "200000 100000"}}, 2.0),
        (
            "4:cpu,cpuacct:/a\n0::/",
            {"cpu,cpuacct/a": {"cpu.cfs_quota_us": "250000", "cpu.cfs_period_us": "100000"}},
            2.5,
        ),
        ("4:cpuacct,cpu:/a", {"cpu": {"cpu.cfs_quota_us": "100000", "cpu.cfs_period_us": "50000"}}, 2.0),
        ("4:cpu:/", {"cpu": {"cpu.cfs_quota_us": "-1", "cpu.cfs_period_us": "100000"}}, None),
        ("4:cpuset:/a", {"cpuset/a": {"cpu.cfs_quota_us": "100000", "cpu.cfs_period_us": "100000"}}, None),
        ("", {}, None),
    ],
)
def test_quota_of_control_groups(
    tmp_path: Path, own: str, files: dict[str, dict[str, str]], quota: float | None
) -> None:
    groups = tmp_path / "groups"
    groups.mkdir()
    (tmp_path / "own").write_text(own + "\n" if own else "")
    for folder, content in files.items():
        group(groups / folder, content)
    assert cpu_quota(groups, tmp_path / "own") == quota
    system = machine(tmp_path, ["0", "1", "2", "3"])
    expected = 4 if quota is None else max(int(quota), 1)
    assert available_processors(system, groups, tmp_path / "own", {0, 1, 2, 3}) == expected
