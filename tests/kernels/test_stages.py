"""Stages are counted when VVUPIPE_STAGES=1, without a gap; else the compiled kernels have no trace of them.

What a worker counts is tested on a running one, in tests/perf/test_profiling.py.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kernels.stage_layout import STAGES_ENV

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.timeout(100)


def count(wanted):
    environment = {**os.environ, STAGES_ENV: wanted}
    command = [sys.executable, "-m", "tests.kernels.stages_job"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=90, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_every_cycle_belongs_to_a_stage():
    found = count("1")
    assert found["counter_reads"] == 3
    assert {name: laps for name, laps in found["laps"].items() if laps} == {"find": 1, "parse": 2}
    assert found["cycles"]["find"] > 0
    assert found["cycles"]["parse"] > 0
    assert sum(found["cycles"].values()) == found["between_laps"]
    assert 1e6 < found["hertz"] < 1e11


def test_nothing_is_compiled_unless_it_is_wanted():
    found = count("0")
    assert found["counter_reads"] == 0
    assert not any(found["laps"].values())
    assert found["between_laps"] == 0
