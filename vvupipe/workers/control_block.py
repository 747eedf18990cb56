"""The control block of a back-end in POSIX shared memory, as numpy sees it."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass

import numpy as np

from kernels import control_block as layout
from kernels.stage_layout import STAGE_RECORD, STAGES_ON
from vvupipe.memory.mapping import Mapping
from vvupipe.memory.shared import create_unnamed


@dataclass(frozen=True, slots=True)
class VringCounters:
    """What one vring did since the back-end started."""

    requests: int
    errors: int
    read_bytes: int
    written_bytes: int
    flushes: int
    kicks: int
    calls: int
    turns: int  #: times that a worker found requests: requests / turns is the batch
    waiting_sum: int  #: requests that it found then: waiting_sum / turns is the depth; of a packed ring no more than 1

    def as_dict(self) -> dict[str, int]:
        """The counters by name."""
        return asdict(self)


class ControlBlock:
    """Record arrays on the shared memory behind `fd` (layout: kernels/control_block.py).

    They are `workers`, `vrings`, and `stages` of the workers, which is empty when those do not count stages.
    Raises: UserError when there is no room for a new block.
    """

    def __init__(self, num_workers: int, num_vrings: int, fd: int | None = None, *, stages: bool = STAGES_ON) -> None:
        num_stages = num_workers if stages else 0
        size_bytes = layout.block_bytes(num_workers, num_vrings, num_stages)
        self.fd = create_unnamed(size_bytes) if fd is None else fd
        self._mapping = Mapping(self.fd, size_bytes)
        split = num_workers * layout.WORKER.itemsize
        if fd is None:
            shape = np.array([(layout.SHAPE_MAGIC, num_workers, num_vrings, num_stages, b"")], layout.SHAPE)
            self._mapping.view[-layout.SHAPE.itemsize :] = shape.tobytes()
        self.workers = np.frombuffer(self._mapping.view, layout.WORKER, num_workers)
        self.vrings = np.frombuffer(self._mapping.view, layout.VRING, num_vrings, split)
        behind = split + num_vrings * layout.VRING.itemsize
        self.stages = np.frombuffer(self._mapping.view, STAGE_RECORD, num_stages, behind)
        self._address = self._mapping.address
        self._split, self._behind = split, behind

    @classmethod
    def attach(cls, fd: int) -> ControlBlock:
        """The block behind `fd`, whoever made it. Raises: ValueError when there is none; OSError."""
        size_bytes = os.fstat(fd).st_size
        tail = os.pread(fd, layout.SHAPE.itemsize, max(0, size_bytes - layout.SHAPE.itemsize))
        if len(tail) < layout.SHAPE.itemsize:
            raise ValueError("too small for a control block")
        shape = np.frombuffer(tail, layout.SHAPE)[0]
        workers, vrings = int(shape["num_workers"]), int(shape["num_vrings"])
        stages = int(shape["num_stage_records"])
        known = shape["magic"] == layout.SHAPE_MAGIC and stages in (0, workers)
        if not known or layout.block_bytes(workers, vrings, stages) != size_bytes:
            raise ValueError("no control block, or one of another version")
        return cls(workers, vrings, fd, stages=stages > 0)

    def worker_address(self, index: int) -> int:
        """Address of a worker's record in this process."""
        return int(self._address + index * layout.WORKER.itemsize)

    def vring_address(self, index: int) -> int:
        """Address of a vring's record in this process."""
        return int(self._address + self._split + index * layout.VRING.itemsize)

    def stages_address(self, index: int) -> int:
        """Address of a worker's record of stages in this process; 0 when there is none."""
        return int(self._address + self._behind + index * STAGE_RECORD.itemsize) if len(self.stages) else 0

    def raise_attention(self, worker: int) -> None:
        """Make a worker's kernel return to its commands; call it after the command was sent."""
        self.workers["attention"][worker] += 1

    def counters(self, index: int) -> VringCounters:
        """A copy of one vring's counters."""
        record = self.vrings[index]
        return VringCounters(*(int(record[name]) for name in VringCounters.__dataclass_fields__))
