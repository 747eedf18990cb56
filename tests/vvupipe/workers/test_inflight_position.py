"""Where a vring stands by its inflight region alone, also when its worker died between two stores."""

import numpy as np
import pytest

from kernels.inflight_layout import PACKED_HEAD, PACKED_STATE, SPLIT_HEAD, SPLIT_STATE
from vvupipe.workers import inflight_position

SIZE = 8


def split_part(used_idx, inflight, version=1):
    head = np.array([(0, version, SIZE, 0, used_idx)], SPLIT_HEAD)
    states = np.zeros(SIZE, SPLIT_STATE)
    states["inflight"][inflight] = 1
    return memoryview(head.tobytes() + states.tobytes())


def packed_part(used, old_used, free_head, old_free_head, taken, inflight):
    """used, old_used: (slot, wrap counter). taken: {head entry: entries}; all other entries are free."""
    head = np.array(
        [(0, 1, SIZE, free_head, old_free_head, used[0], old_used[0], used[1], old_used[1], b"")], PACKED_HEAD
    )
    states = np.zeros(SIZE, PACKED_STATE)
    states["next"] = np.arange(1, SIZE + 1)
    for entry, count in taken.items():
        states["num"][entry] = count
        if entry == free_head:
            states["next"][entry + count - 1] = 5  # given back: in front of those that were free
    states["inflight"][inflight] = 1
    return memoryview(head.tobytes() + states.tobytes())


def test_split():
    assert inflight_position.of(split_part(0xFFFF, [2, 5]), SIZE, packed=False) == (1, 2)


@pytest.mark.parametrize("packed", [False, True])
def test_region_that_nobody_used(packed):
    empty = memoryview(bytes(PACKED_HEAD.itemsize + SIZE * PACKED_STATE.itemsize))
    assert inflight_position.of(empty, SIZE, packed=packed) is None


OLD, NEW = (6, 1), (1, 0)  # the chain of three entries at 0 was the last to be given back
DIED = {
    "between two requests": ((OLD, OLD, 5, 5, [0, 3]), 2),
    "while a chain was taken": ((OLD, OLD, 5, 5, [0, 3, 5]), 2),
    "before it said that a chain is used": ((OLD, OLD, 0, 5, [0, 3]), 2),
    "while it gave a chain back": ((NEW, OLD, 0, 5, [0, 3]), 2),
    "when the driver had it": ((NEW, OLD, 0, 5, [3]), 2),
    "before the last store of that": ((NEW, OLD, 0, 0, [3]), 2),
}


@pytest.mark.parametrize("moment", DIED)
def test_packed(moment):
    """Slot 6 with wrap counter 1, and three and two slots behind it, of eight."""
    (used, old_used, free_head, old_free_head, inflight), undone = DIED[moment]
    part = packed_part(used, old_used, free_head, old_free_head, {0: 3, 3: 2, 5: 1}, inflight)
    assert inflight_position.of(part, SIZE, packed=True) == (3, undone)


def test_packed_region_with_nonsense():
    """It is the front-end's, who may write anything."""
    part = memoryview(b"\xff" * (PACKED_HEAD.itemsize + SIZE * PACKED_STATE.itemsize))
    assert inflight_position.of(part, SIZE, packed=True)
