"""Where a vring stands by its inflight region alone, when its own memory cannot be seen (kernels/inflight_*.py)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kernels.inflight_layout import PACKED_HEAD, PACKED_STATE, SPLIT_HEAD, SPLIT_STATE
from kernels.virtio_layout import PACKED_WRAP

_SPLIT_MASK = 0xFFFF


def of(part: memoryview, size: int, *, packed: bool) -> tuple[int, int] | None:
    """(last_avail_idx, requests that were taken and are not done); None when nobody has served the vring yet.

    part: the vring's part of the region, which may say anything. size: entries of the vring.
    """
    head_type, state_type = (PACKED_HEAD, PACKED_STATE) if packed else (SPLIT_HEAD, SPLIT_STATE)
    head = np.frombuffer(part, head_type, 1)[0].copy()
    states = np.frombuffer(part, state_type, size, head_type.itemsize).copy()
    if head["version"] == 0:
        return None
    return _packed(head, states) if packed else _split(head, states)


def _split(head: np.void, states: npt.NDArray[np.void]) -> tuple[int, int]:
    taken = int(np.count_nonzero(states["inflight"]))
    return (int(head["used_idx"]) + taken) & _SPLIT_MASK, taken


def _packed(head: np.void, states: npt.NDArray[np.void]) -> tuple[int, int]:
    size = len(states)
    taken = states["inflight"] != 0
    # One whose entries are free yet was being taken: that was not finished.
    free = int(head["old_free_head"])
    for _ in range(size):
        if free >= size:
            break
        taken[free] = False
        free = int(states["next"][free])
    last_used = tuple(int(head[name]) for name in ("used_idx", "used_wrap_counter"))
    old_used = tuple(int(head[name]) for name in ("old_used_idx", "old_used_wrap_counter"))
    if last_used != old_used and head["free_head"] < size:
        taken[head["free_head"]] = True  # it was being given back, behind `old_used`
    slots = old_used[0] + int(states["num"][taken].sum())
    wrap = (old_used[1] + slots // size) & 1
    return slots % size | (PACKED_WRAP if wrap else 0), int(np.count_nonzero(taken))
