"""Looking at a worker from outside: its kernels' symbols, its counters, pictures of its stacks."""

import json
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from collections import Counter
from pathlib import Path

import pytest

from perf import flame_graph, flame_svg, jit_symbols, live_view
from perf.backends import Backend
from perf.plain import count
from tests.mock.blk_driver import started_disk
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


@pytest.fixture
def back_end(tmp_path):
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(1 << 20))
    with Backend("vvupipe", "socket", None).start(tmp_path / "back-end", image, 0) as running:
        yield running


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
    assert {"kernels.blk_worker.serve", "kernels.blk_queue.serve_next"} <= names


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
    command = [
        sys.executable,
        "perf/live_view.py",
        str(back_end.pids[0]),
        "--json",
        "--count",
        "1",
        "--interval",
        "0.1",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["pid"] == back_end.pids[0]


def test_who_is_no_back_end_is_told():
    command = [sys.executable, "perf/live_view.py", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "no back-end" in done.stderr


def test_batches_are_shown_once_they_are_counted():
    counters = dict.fromkeys(("requests", "errors", "read_bytes", "written_bytes", "flushes", "kicks", "calls"), 0)
    old = {"state": 1, **counters, "turns": 0, "waiting_sum": 0}
    new = {**old, "requests": 80, "turns": 10, "waiting_sum": 160}
    found = live_view.rates(old, new, 2.0)
    assert (found["requests_per_s"], found["batch"], found["depth"]) == (40, 8, 16)
    assert found["requests_per_call"] is None


def test_a_control_block_tells_its_shape():
    made = ControlBlock(3, 5)
    made.vrings["requests"][4] = 7
    found = ControlBlock.attach(made.fd)
    assert (len(found.workers), len(found.vrings), int(found.vrings["requests"][4])) == (3, 5, 7)


def test_other_memory_is_no_control_block(tmp_path):
    path = tmp_path / "file"
    for content in (b"", b"x" * 4096):
        path.write_bytes(content)
        with path.open("rb") as file, pytest.raises(ValueError, match="control block"):
            ControlBlock.attach(file.fileno())
