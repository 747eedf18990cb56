"""How a worker divides its looks among its rings."""

import numpy as np
import pytest

from kernels import loop_record, worker_loop


@pytest.mark.parametrize(("running", "polite", "every"), [(1, 0, 8), (8, 0, 8), (64, 0, 64), (64, 1, 8), (3, 1, 1)])
def test_a_look_at_all_rings_costs_a_request_no_more_when_there_are_many(running, polite, every):
    loop = np.zeros(1, loop_record.LOOP)
    loop["running"], loop["polite"] = running, polite
    looks = [k for k in range(1, 500) if worker_loop.look_at_all(loop[0])]
    assert looks == list(range(every, 500, every))


def test_requests_count_as_looks():
    loop = np.zeros(1, loop_record.LOOP)
    loop["running"] = 64
    assert not worker_loop.look_at_all(loop[0])
    loop["since_all"] += 63
    assert worker_loop.look_at_all(loop[0])
