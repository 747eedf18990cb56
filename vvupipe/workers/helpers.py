"""The helper threads of a worker (kernels/helper.py): made once, asleep until they get something to do."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from kernels.helper_record import HELPER

_STACK_BYTES = 256 << 10  # kernels do not recurse


class Helpers:
    """`records` is a HELPER[count] for kernels; `done_fd` becomes readable when a helper is done."""

    def __init__(self, count: int) -> None:
        self.records: npt.NDArray[np.void] = np.zeros(count, HELPER)
        self.done_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._one = np.ones(1, np.uint64)
        self._scratch = np.zeros((count, 8), np.uint64)
        for index in range(count):
            record = self.records[index]
            record["wake_fd"] = os.eventfd(0, os.EFD_CLOEXEC)
            record["done_fd"] = self.done_fd
            record["one"] = self._one.ctypes.data
            record["scratch"] = self._scratch[index].ctypes.data

    def start(self, life: Callable[[int], None]) -> None:
        """Start a thread for each: `life(index)` never returns; threads end with the process."""
        before = threading.stack_size(_STACK_BYTES)
        try:
            for index in range(len(self.records)):
                threading.Thread(target=life, args=(index,), name=f"helper-{index}", daemon=True).start()
        finally:
            threading.stack_size(before)
