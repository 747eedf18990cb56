"""The comparison: its cases and command lines, and one short run of everything."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from perf import backends, cases, compare, memcpy_limit, report
from perf.backends import Backend
from perf.summary import LIMITS

ROOT = Path(__file__).resolve().parents[2]


def test_case_names_say_all():
    names = [case.name for case in cases.matrix("tmpfs")]
    assert len(names) == len(set(names))
    assert {"tmpfs/4k-randread-d1-sleeping", "tmpfs/4k-randrw-d128", "tmpfs/128k-write-d32"} <= set(names)
    assert "tmpfs/4k-randread-d32-q4" in names
    assert {case.name for case in cases.quick("tmpfs")} <= set(names)


def test_selection_by_work_or_place():
    every = [*cases.matrix("tmpfs"), *cases.matrix("direct")]
    assert {case.place for case in cases.select(every, ["tmpfs/*"])} == {"tmpfs"}
    assert [case.name for case in cases.select(every, ["4k-randrw-d8"])] == [
        "tmpfs/4k-randrw-d8",
        "direct/4k-randrw-d8",
    ]
    assert cases.select(every, []) == every


def test_only_a_sleeping_front_end_never_spins():
    assert {case.spin_us == 0 for case in cases.matrix("tmpfs") if case.sleeps} == {True}
    assert all(case.spin_us > 0 for case in cases.matrix("tmpfs") if not case.sleeps)


def test_orders_rotate():
    assert [cases.rotated("abc", k) for k in range(4)] == [list("abc"), list("bca"), list("cab"), list("abc")]


def test_command_lines():
    image, socket = Path("i.img"), Path("s")
    ours = Backend("vvupipe", "socket", "uring").command(image, socket, 1, direct=True)
    assert ours[ours.index("--engine") + 1] == "uring"
    assert "--direct" in ours
    assert "--engine" not in Backend("vvupipe", "vfio", None).command(image, socket, 1, direct=False)
    daemon = " ".join(Backend("qsd", "", "native").command(image, socket, 1, direct=True))
    assert "aio=native,cache.direct=on" in daemon


def test_what_makes_no_sense_is_left_out():
    assert not backends.can_serve(Backend("qsd", "", "native"), direct=False)
    assert not backends.can_serve(Backend("vvupipe", "socket", "mmap"), direct=True)
    assert backends.can_serve(Backend("vvupipe", "socket", None), direct=True)


def test_options_fill_in():
    options = compare.parse(["--quick", "--rounds", "2"])
    assert (options.rounds, options.place) == (2, ["page-cache"])
    assert compare.parse([]).place == ["page-cache", "tmpfs", "direct"]


def test_the_limit_of_the_machine_is_measured(tmp_path):
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(range(256)) * (16 << 12))
    before = image.read_bytes()
    for workload, block, way in (
        ("randread", 4096, memcpy_limit.ONE),
        ("read", 131072, memcpy_limit.AHEAD),
        ("randread", 4096, memcpy_limit.READING),
        ("read", 131072, memcpy_limit.READING),
    ):
        found = memcpy_limit.measure(image, workload, block, 32, 0.05, 0, way)
        assert found["iops"] > 1000
        assert found["cpu_us_per_request"] > 0
    assert image.read_bytes() == before
    memcpy_limit.measure(image, "randwrite", 4096, 32, 0.05, 0, memcpy_limit.ONE)
    assert image.read_bytes() != before


@pytest.mark.timeout(300)
def test_a_short_run_leaves_results_and_a_report(tmp_path):
    command = [
        *(sys.executable, "perf/compare.py", "--rounds", "1", "--seconds", "0.1", "--size", "16", "--idle", "0.2"),
        *("--place", "tmpfs", "--only", "4k-randread-d32", "--backend", "vvupipe socket", "--engines", "auto"),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    folder = Path(done.stdout.strip()).parent
    try:
        lines = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
        assert [line["kind"] for line in lines].count("idle") == 1
        measured = {line["backend"]: line for line in lines if line["kind"] == "measurement"}
        ours = next(line for name, line in measured.items() if name.startswith("vvupipe socket"))
        assert ours["result"]["ok"]
        assert ours["iops"] > 100
        assert ours["cpu_s"] >= 0  # the kernel counts in ticks, of which so short a run may have none
        assert set(LIMITS) < set(measured)
        assert {"commit", "cpu", "kernel", "numba", "front_end_cpu", "back_end_cpu"} <= set(ours)
        assert "tmpfs" in (folder / "report.md").read_text()
        assert report.load(folder).cases == ["tmpfs/4k-randread-d32"]
    finally:
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()
