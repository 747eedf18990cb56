"""Bad input to the programs of perf/: one line, exit status 2, no folder of results."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from perf import flame_graph, live_view, machine
from perf.backends import Backend
from vvupipe.errors import UserError

pytestmark = pytest.mark.timeout(90)
ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = ("compare", "flame_graph", "growth", "guest_fio", "live_view", "real_guest", "report", "stages")


def run(program, *arguments):
    return subprocess.run(
        [sys.executable, f"perf/{program}.py", *map(str, arguments)],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def results():
    return set(machine.RESULTS.iterdir()) if machine.RESULTS.exists() else set()


def assert_refused(program, arguments, says):
    before = results()
    done = run(program, *arguments)
    assert done.returncode == 2, done
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"{program}: ")
    assert says in line
    assert results() == before


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_program_has_help_and_can_be_run(program):
    done = run(program, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"usage: {program}.py")
    assert os.access(ROOT / "perf" / f"{program}.py", os.X_OK)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--backend", "nope"], "--backend nope: no back-end's name begins so"),
        (["--backend", "vvupipe", "--backend", "nope"], "--backend nope"),
        (["--engines", "foo"], "'foo' is not one of auto, mmap, uring, sync"),
        (["--engines", "auto,"], "'' is not one of"),
        (["--only", "nope"], "--only nope: no case has such a name"),
        (["--only", "tmpfs/*", "--place", "direct"], "--only tmpfs/*"),
        (["--engines", "mmap", "--backend", "vvupipe", "--place", "direct"], "cannot serve with --place direct"),
        (["--rounds", 0], "from 1 on"),
        (["--seconds", 0], "above 0"),
        (["--seconds", "nan"], "above 0"),
        (["--idle", -1], "not below 0"),
        (["--folder", "/nonexistent"], "/nonexistent: there is no such folder"),
        (["--list", "--only", "nope"], "--only nope"),
    ],
)
def test_comparison(arguments, says):
    assert_refused("compare", arguments, says)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--seconds", 0, "--curve", "queues"], "above 0"),
        (["--rounds", 0], "from 1 on"),
        (["--uptime", 0], "from 1 on"),
        (["--folder", "/nonexistent"], "/nonexistent: there is no such folder"),
        (["--report", "/nonexistent"], "/nonexistent/results.jsonl: No such file"),
        (["--backend", "nope"], "--backend nope"),
    ],
)
def test_growth(arguments, says):
    assert_refused("growth", arguments, says)


@pytest.mark.parametrize(
    ("program", "arguments", "says"),
    [
        ("live_view", ["--interval", -1], "above 0"),
        ("live_view", [1, "--interval", 0], "above 0"),
        ("live_view", ["--count", -1], "from 0 on"),
        ("live_view", [0], "process 0 is no back-end"),
        ("stages", [1, "--interval", -1], "above 0"),
        ("stages", ["x"], "invalid int value"),
        ("flame_graph", [1], "process 1 is no back-end"),
        ("flame_graph", [1 << 30], f"process {1 << 30} is no back-end"),
        ("flame_graph", [1, "--seconds", -1], "above 0"),
        ("flame_graph", [1, "--hertz", 0], "from 1 on"),
        ("report", ["/nonexistent"], "/nonexistent/results.jsonl: No such file"),
        ("report", [], "folder"),
        ("guest_fio", ["--seconds", 0], "above 0"),
        ("real_guest", ["--rounds", 0], "from 1 on"),
    ],
)
def test_other_programs(program, arguments, says):
    assert_refused(program, arguments, says)


@pytest.mark.parametrize(("program", "arguments"), [("report", []), ("growth", ["--report"])])
@pytest.mark.parametrize(
    ("content", "says"),
    [("", "nothing was measured"), ("{", "not lines of JSON"), ('{"a": 1}\n', "results of another program")],
)
def test_results_that_are_none(tmp_path, program, arguments, content, says):
    (tmp_path / "results.jsonl").write_text(content)
    assert_refused(program, [*arguments, tmp_path], says)


@pytest.fixture(scope="module")
def back_end(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    image = folder / "disk.img"
    image.write_bytes(bytes(1 << 20))
    with Backend("vvupipe", "socket", None).start(folder / "back-end", image, 0) as running:
        yield running.pids[0]


def test_a_flame_graph_with_nowhere_to_go(back_end):
    assert_refused("flame_graph", [back_end, "--output", "/proc/nope"], "--output /proc/nope: No such file")


def test_who_is_above_a_back_end_is_none(back_end):
    """The process that started it is not meant, nor the first process of all."""
    with pytest.raises(UserError, match=f"process {os.getpid()} is no back-end"):
        flame_graph.worker_of(os.getpid())


def test_a_worker_stands_for_its_back_end(back_end):
    worker = flame_graph.worker_of(back_end)
    assert worker != back_end
    assert flame_graph.worker_of(worker) == worker
    assert live_view.back_end_of(worker) == live_view.back_end_of(back_end) == back_end
    looking = live_view.Watched.of(back_end)
    assert looking
    assert live_view.back_end_of(os.getpid()) is None, "who looks at a back-end is none"
    assert [each.pid for each in live_view.back_ends(os.getpid())] == []
    assert back_end in [each.pid for each in live_view.back_ends(None)]
    done = run("live_view", worker, "--json", "--count", 1, "--interval", 0.1)
    assert json.loads(done.stdout)["pid"] == back_end
