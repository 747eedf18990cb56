"""Bad input to the programs of perf/: one line, exit status 2, no folder of results."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from perf import machine

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
