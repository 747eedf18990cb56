"""Looking at a worker from outside: its kernels' symbols, its counters, pictures of its stacks."""

import json
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from collections import Counter
from pathlib import Path

import pytest

from kernels.stage_layout import SLEEP, STAGES, STAGES_ENV
from perf import flame_graph, flame_svg, jit_symbols, live_view, stages
from perf.backends import Backend
from perf.plain import count
from tests.mock import frontend as fe
from tests.mock.blk_driver import IN, started_disk
from vvupipe.workers.control_block import ControlBlock

ROOT = Path(__file__).resolve().parents[2]

#: as `perf script -F ip,sym` prints it
SCRIPT = """
\t    7f00 copy_bytes
\t    7e00 kernels.blk_io.read_sectors+0x1

\t    7f00 copy_bytes
\t    7e00 kernels.blk_io.read_sectors

\tffff do_poll
\t    0 [unknown]
"""


def started(tmp_path):
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(1 << 20))
    return Backend("vvupipe", "socket", None).start(tmp_path / "back-end", image, 0)


@pytest.fixture
def back_end(tmp_path):
    with started(tmp_path) as running:
        yield running


@pytest.fixture
def counting_back_end(tmp_path, monkeypatch):
    monkeypatch.setenv(STAGES_ENV, "1")
    with started(tmp_path) as running:
        yield running


def run(*command):
    return subprocess.run(
        [sys.executable, *map(str, command)], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )


def test_stacks_are_collapsed():
    assert flame_graph.collapse(SCRIPT) == {("kernels.blk_io.read_sectors", "copy_bytes"): 2, ("do_poll",): 1}


def test_what_is_below_the_kernel_is_cut_off():
    stacks = Counter({("main", "kernels.blk_worker.serve", "poll"): 2, ("other",): 1})
    assert flame_graph.trimmed(stacks) == {("kernels.blk_worker.serve", "poll"): 2, ("other",): 1}


def test_a_flame_graph_is_well_formed():
    text = flame_svg.draw({("kernels.a.b", "<c>"): 3, ("kernels.a.b",): 1}, "a & b")
    titles = [each.text for each in ET.fromstring(text).iter("{http://www.w3.org/2000/svg}title")]
    assert titles == ["all: 4 samples, 100.0 %", "kernels.a.b: 4 samples, 100.0 %", "<c>: 3 samples, 75.0 %"]


@pytest.mark.parametrize(
    ("symbol", "name"),
    [
        ("NRT_incref", "NRT_incref"),
        ("_ZN7kernels9blk_queue10serve_ringB2v1B40c8tJTEx", "kernels.blk_queue.serve_ring"),
    ],
)
def test_names_are_readable(symbol, name):
    assert jit_symbols.readable_name(symbol) == name


def test_numbers_are_short():
    assert [count(value) for value in (None, 0, 87.25, 152_300, 2_410_000)] == ["-", "0", "87.2", "152k", "2.41M"]


def test_kernels_of_a_running_worker_are_found(back_end):
    worker = flame_graph.worker_of(back_end.pids[0])
    names = {symbol.name for symbol in jit_symbols.symbols_of(worker)}
    assert {"kernels.blk_entries.serve", "kernels.blk_queue.serve_ring"} <= names


def test_a_process_without_kernels_says_so():
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        try:
            with pytest.raises(jit_symbols.NoJit, match="runs no kernels"):
                jit_symbols.symbols_of(process.pid)
        finally:
            process.kill()


def test_counters_of_a_running_back_end_are_seen(back_end):
    watched = live_view.Watched.of(back_end.pids[0])
    with started_disk(back_end.socket) as (_, driver):
        assert watched.step() == {}
        for sector in range(5):
            driver.read(sector, 512)
        time.sleep(0.1)
        view = watched.step()
    (row,) = view["vrings"]
    assert (row["vring"], row["state"]) == (0, "running")
    assert row["requests_per_s"] > 0
    assert row["read_bytes_per_s"] == pytest.approx(512 * row["requests_per_s"])
    assert "running" in live_view.text(view)


def test_live_view_prints_json(back_end):
    done = run("perf/live_view.py", back_end.pids[0], "--json", "--count", 1, "--interval", 0.1)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["pid"] == back_end.pids[0]


def test_who_is_no_back_end_is_told():
    for script in ("live_view", "stages"):
        done = run(f"perf/{script}.py", 1)
        assert done.returncode == 2
        assert "no back-end" in done.stderr


COUNTERS = ("requests", "errors", "read_bytes", "written_bytes", "flushes", "kicks", "calls", "turns", "waiting_sum")


def test_queue_depth_and_batches_are_shown():
    old = {"state": 1, "under_way": 9, **dict.fromkeys(COUNTERS, 100)}
    new = {**old, "under_way": 3, "requests": 180, "turns": 110, "waiting_sum": 260, "kicks": 104, "calls": 120}
    found = live_view.rates(old, new, 2.0)
    assert (found["requests_per_s"], found["batch"], found["depth"], found["under_way"]) == (40, 8, 16, 3)
    assert (found["kicks_per_request"], found["calls_per_request"]) == (0.05, 0.25)
    idle = live_view.rates(old, old, 2.0)
    assert [idle[key] for key in ("batch", "depth", "kicks_per_request", "calls_per_request")] == [None] * 4
    view = {"pid": 1, "cpu_percent": 50.0, "workers": [{"worker": 0, "sleeps_per_s": 7.5}]}
    head, names, row = live_view.text({**view, "vrings": [{"vring": 2, **found}]}).splitlines()
    assert "7.5 of worker 0" in head
    assert names.split()[-7:] == ["depth", "batch", "under", "way", "kicks/req", "calls/req", "errors/s"]
    assert row.split() == ["2", "running", "40", "0", "0", "16", "8", "3", "0.05", "0.25", "0"]


def test_depth_is_what_waits_when_the_worker_looks(back_end):
    watched = live_view.Watched.of(back_end.pids[0])
    with started_disk(back_end.socket) as (_, driver):
        driver.read(0, 512)
        watched.step()
        for sector in range(5):
            driver.read(sector, 512)
        time.sleep(0.1)
        (row,) = watched.step()["vrings"]
    assert (row["depth"], row["batch"], row["under_way"]) == (1, 1, 0)


def test_stages_of_a_running_worker_are_counted(counting_back_end):
    watched = live_view.Watched.of(counting_back_end.pids[0])
    with started_disk(counting_back_end.socket) as (_, driver):
        # Records stand still while the worker sleeps.
        driver.read(0, 512)
        time.sleep(0.1)
        (before,), last = stages.read(watched), int(watched.block.stages["last"][0])
        for sector in range(50):
            driver.read(sector, 512)
        time.sleep(0.1)
        (after,), passed = stages.read(watched), int(watched.block.stages["last"][0]) - last
    assert sum(after["cycles"]) - sum(before["cycles"]) == passed, "no cycle is without a stage"
    assert passed / after["hertz"] == pytest.approx((after["time_ns"] - before["time_ns"]) / 1e9, rel=0.5)
    found = stages.difference(before, after)
    assert found["requests"] == 50
    assert found["stages"]["copy"]["laps"] == found["stages"]["do"]["laps"] == 50
    assert sum(stage["share"] for name, stage in found["stages"].items() if name != "sleep") == pytest.approx(1)
    rows = stages.text(0, found).splitlines()
    assert [row.split()[0] for row in rows[1:3]] == ["stage", "find"]
    assert rows[-1].split()[0] == "awake"


def test_stages_of_requests_that_come_together(counting_back_end):
    watched = live_view.Watched.of(counting_back_end.pids[0])
    # Without IN_ORDER, which has each wait for the one before.
    features = fe.F_VERSION_1 | fe.F_PROTOCOL_FEATURES | fe.F_BLK_FLUSH
    with started_disk(counting_back_end.socket, features) as (_, driver):
        driver.read(0, 512)
        time.sleep(0.1)
        (before,) = stages.read(watched)
        ring, memory = driver.ring, driver.memory
        heads = []
        for number in range(5):
            header, status, buffer = memory.allocate(16), memory.allocate(1), memory.allocate(512)
            memory.pack("<IIQ", header, IN, 0, number)
            heads.append(ring.put_chain([(header, 16, False), (buffer, 512, True), (status, 1, True)]))
        ring.make_available(*heads)
        ring.kick()
        for _ in heads:
            ring.wait_used()
        time.sleep(0.1)
        (after,) = stages.read(watched)
    laps = {name: stage["laps"] for name, stage in stages.difference(before, after)["stages"].items()}
    assert laps["take"] == 5
    for stage in ("find", "look ahead", "parse", "do", "copy", "answer"):
        assert laps[stage] == 1, "they go through it together"
    assert laps["publish"] == laps["call"] == 1
    assert laps["hand on"] == laps["collect"] == laps["keep"] == 0, "nobody else had anything to do"


def test_stages_are_printed(counting_back_end):
    done = run("perf/stages.py", counting_back_end.pids[0], "--interval", 0.2)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("worker 0: 0 requests/s, asleep for ")
    done = run("perf/stages.py", counting_back_end.pids[0], "--interval", 0.2, "--json")
    found = json.loads(done.stdout)
    assert found["pid"] == counting_back_end.pids[0]
    assert list(found["workers"][0]["stages"]) == list(STAGES)


def test_a_back_end_that_counts_no_stages_says_so(back_end):
    done = run("perf/stages.py", back_end.pids[0])
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1
    assert "VVUPIPE_STAGES=1" in done.stderr


def test_a_worker_that_slept_all_the_time_slept_all_the_time():
    old = {"time_ns": 0, "hertz": 10**9, "cycles": [5] * len(STAGES), "laps": [1] * len(STAGES)}
    found = stages.difference(old, {**old, "time_ns": 2 * 10**9})
    assert found["stages"]["sleep"]["share"] == 1
    assert found["stages"]["copy"]["cycles_per_request"] is None
    # It woke up from a sleep that began long before the interval, and worked for half of that.
    cycles = [*([5] * SLEEP), 10**12]
    cycles[0] += 10**9
    found = stages.difference(old, {**old, "time_ns": 2 * 10**9, "cycles": cycles})
    assert found["stages"]["sleep"]["share"] == 0.5


@pytest.mark.parametrize("counting", [False, True])
def test_a_control_block_tells_its_shape(counting):
    made = ControlBlock(3, 5, stages=counting)
    made.vrings["requests"][4] = 7
    made.stages["last"][2:] = 8
    found = ControlBlock.attach(made.fd)
    assert (len(found.workers), len(found.vrings), int(found.vrings["requests"][4])) == (3, 5, 7)
    assert found.stages["last"].tolist() == ([0, 0, 8] if counting else [])
    assert (found.stages_address(2) != 0) is counting


def test_other_memory_is_no_control_block(tmp_path):
    path = tmp_path / "file"
    for content in (b"", b"x" * 4096):
        path.write_bytes(content)
        with path.open("rb") as file, pytest.raises(ValueError, match="control block"):
            ControlBlock.attach(file.fileno())
