"""Stages are counted when VVUPIPE_STAGES=1, without a gap; else the compiled kernels have no trace of them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kernels.stage_layout import STAGES_ENV

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.timeout(300)  # kernels that count are compiled once more


def serve(wanted):
    environment = {**os.environ, STAGES_ENV: wanted}
    command = [sys.executable, "-m", "tests.kernels.stages_job"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_every_cycle_belongs_to_a_stage():
    found = serve("1")
    laps = found["laps"]
    assert found["counter_reads"] > 0
    assert laps["parse"] == found["requests"]
    others = found["requests"] - laps["keep"] - laps["do"]
    assert 0 <= others <= laps["copy"], "copied by way of a slot, done on the spot, or copied alone"
    assert 0 < laps["copy"] - others <= laps["keep"], "copies are done together"
    assert laps["publish"] == laps["call"] > 0
    assert laps["find"] > 0
    assert laps["hand on"] == laps["collect"] == 0, "there is nobody to hand anything on to"
    assert 0 < found["cycles"] == found["between_laps"] < found["elapsed"]
    assert 1e6 < found["hertz"] < 1e11


def test_nothing_is_compiled_unless_it_is_wanted():
    found = serve("0")
    assert found["requests"] > 0
    assert found["counter_reads"] == 0
    assert not any(found["laps"].values())
