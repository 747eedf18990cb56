"""A ring of io_uring for the kernels of kernels/uring.py: set it up, map it, register file and buffers."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Iterable
from types import TracebackType

import numpy as np
import numpy.typing as npt

from kernels import uring_layout as layout
from vvupipe.memory.mapping import Mapping
from vvupipe.workers import io_uring_calls as calls

#: Ways to set a ring up, best first; a kernel that is too old for one answers EINVAL.
MODES = (
    layout.SETUP_SINGLE_ISSUER | layout.SETUP_DEFER_TASKRUN | layout.SETUP_TASKRUN_FLAG | layout.SETUP_SUBMIT_ALL,
    layout.SETUP_COOP_TASKRUN | layout.SETUP_TASKRUN_FLAG | layout.SETUP_SUBMIT_ALL,
    0,
)
SQPOLL_MODES = (
    layout.SETUP_SQPOLL | layout.SETUP_SINGLE_ISSUER | layout.SETUP_SUBMIT_ALL,
    layout.SETUP_SQPOLL,
)
_OPCODES = {
    "READ": layout.OP_READ,
    "WRITE": layout.OP_WRITE,
    "READV": layout.OP_READV,
    "WRITEV": layout.OP_WRITEV,
    "FSYNC": layout.OP_FSYNC,
    "READ_FIXED": layout.OP_READ_FIXED,
    "WRITE_FIXED": layout.OP_WRITE_FIXED,
}


class IoUring:
    """One ring. `record` is a layout.URING[1] for kernels; it is valid until `close`.

    Only the thread that opened it may register, submit and reap: SINGLE_ISSUER answers EEXIST to others.
    """

    def __init__(self, entries: int, flags: int, sqpoll_idle_ms: int = 0) -> None:
        """Set up a ring in one way (`flags` of MODES or SQPOLL_MODES, IOPOLL besides or not).

        Raises: OSError. Others call `open`.
        """
        parameters = np.zeros(1, layout.PARAMS)
        parameters["flags"] = flags | layout.SETUP_CQSIZE
        parameters["cq_entries"] = 2 << (entries - 1).bit_length()  # twice the SQ, which is a power of two
        parameters["sq_thread_idle"] = sqpoll_idle_ms
        self.record = np.zeros(1, layout.URING)
        self._mappings: list[Mapping] = []
        self._buffers = 0
        self._event_fd = -1
        self.fd = calls.set_up(entries, parameters)
        try:
            self._map(parameters[0])
            self._register_eventfd()
        except BaseException:
            self.close()
            raise

    @classmethod
    def open(cls, entries: int, *, sqpoll: bool = False, iopoll: bool = False, sqpoll_idle_ms: int = 50) -> IoUring:
        """A ring with room for `entries` requests (1 to 32768, rounded up to a power of two), the best that Linux has.

        sqpoll: a thread of the kernel takes requests; it sleeps after `sqpoll_idle_ms` without one. Before
        Linux 5.11 it takes only requests for the registered file.
        iopoll: completions are looked for at the device, which must have polled queues; for plain direct I/O only.
        Raises: OSError, its message says why; ValueError.
        """
        if not 1 <= entries <= layout.ENTRIES_MAX:
            raise ValueError(f"a ring has 1 to {layout.ENTRIES_MAX} entries, not {entries}")
        modes = SQPOLL_MODES if sqpoll else MODES
        for flags in modes:
            try:
                return cls(entries, flags | (layout.SETUP_IOPOLL if iopoll else 0), sqpoll_idle_ms if sqpoll else 0)
            except OSError as error:
                if error.errno != errno.EINVAL or flags == modes[-1]:
                    raise OSError(error.errno, f"io_uring cannot be used: {calls.reason(error)}") from error
        raise AssertionError("the last mode returns or raises")

    def _map(self, parameters: np.void) -> None:
        """Map SQ, CQ and SQEs, and say in `record` where everything lies."""
        sq, cq = parameters["sq_off"], parameters["cq_off"]
        if not cq["flags"]:
            raise OSError(errno.EOPNOTSUPP, calls.TOO_OLD)
        sq_entries, cq_entries = int(parameters["sq_entries"]), int(parameters["cq_entries"])
        sq_bytes = int(sq["array"]) + 4 * sq_entries
        cq_bytes = int(cq["cqes"]) + layout.CQE.itemsize * cq_entries
        if parameters["features"] & layout.FEAT_SINGLE_MMAP:
            ring = self._mapped(max(sq_bytes, cq_bytes), layout.OFF_SQ_RING)
            sq_address, cq_address = ring.address, ring.address
        else:
            ring = self._mapped(sq_bytes, layout.OFF_SQ_RING)
            sq_address, cq_address = ring.address, self._mapped(cq_bytes, layout.OFF_CQ_RING).address
        # Entry i of the SQ names SQE i for ever, so that a kernel only writes SQEs and the tail.
        indices = np.frombuffer(ring.view, np.uint32, sq_entries, int(sq["array"]))
        indices[:] = np.arange(sq_entries, dtype=np.uint32)
        del indices
        fields = {
            "fd": self.fd,
            "setup_flags": int(parameters["flags"]),
            "sqes": self._mapped(layout.SQE.itemsize * sq_entries, layout.OFF_SQES).address,
            "sq_entries": sq_entries,
            "sq_mask": sq_entries - 1,
            "cq_entries": cq_entries,
            "cq_mask": cq_entries - 1,
            "cqes": cq_address + int(cq["cqes"]),
        }
        fields |= {f"sq_{name}": sq_address + int(sq[name]) for name in ("head", "tail", "flags", "dropped")}
        fields |= {f"cq_{name}": cq_address + int(cq[name]) for name in ("head", "tail", "flags", "overflow")}
        for name, value in fields.items():
            self.record[name] = value

    def _register_eventfd(self) -> None:
        """What a worker sleeps on; silent until kernels.uring.want_wakes."""
        self._event_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        calls.register(self.fd, layout.REGISTER_EVENTFD, np.array([self._event_fd], np.int32), 1)
        self.record["event_fd"] = self._event_fd
        refuse_wakes = np.array([layout.CQ_EVENTFD_DISABLED], np.uint32)
        ctypes.memmove(int(self.record["cq_flags"][0]), refuse_wakes.ctypes.data, refuse_wakes.nbytes)

    def _mapped(self, size_bytes: int, offset: int) -> Mapping:
        self._mappings.append(Mapping(self.fd, size_bytes, offset))
        return self._mappings[-1]

    def register_file(self, fd: int) -> None:
        """Make `fd` the file of every request from here on: the kernel need not look it up each time.

        A former one is forgotten. Nothing may be queued. Raises: OSError.
        """
        if self.record["fixed_file"][0]:
            calls.register(self.fd, layout.UNREGISTER_FILES, None, 0)
            self.record["fixed_file"] = 0
        calls.register(self.fd, layout.REGISTER_FILES, np.array([fd], np.int32), 1)
        self.record["fixed_file"] = 1

    def register_buffers(self, ranges: Iterable[tuple[int, int]]) -> npt.NDArray[np.uint64]:
        """Pin ranges of memory, (address, bytes) each, so that requests need not; former ones are forgotten.

        Returns uint64[n, 2]: row i is address and bytes of the buffer with index i. A range of more than 1 GiB is cut
        into several, and a request must lie in one of them. All of it stays in memory until `unregister_buffers`.
        Raises: OSError, with nothing registered: the limit of locked memory (ENOMEM), memory that Linux cannot pin
        (EFAULT, EOPNOTSUPP: a device's, or a file's of a disk), more than 16384 pieces (EINVAL).
        """
        self.unregister_buffers()
        pieces = [
            (start, min(layout.BUFFER_BYTES_MAX, address + size_bytes - start))
            for address, size_bytes in ranges
            for start in range(address, address + size_bytes, layout.BUFFER_BYTES_MAX)
        ]
        if len(pieces) > layout.BUFFERS_MAX:
            raise OSError(errno.EINVAL, f"{len(pieces)} buffers of 1 GiB at most, Linux takes {layout.BUFFERS_MAX}")
        table = np.array(pieces, np.uint64).reshape(-1, 2)
        if pieces:
            try:
                calls.register(self.fd, layout.REGISTER_BUFFERS, table, len(pieces))
            except OSError as error:
                raise OSError(error.errno, f"memory cannot be registered with io_uring: {error.strerror}") from error
        self._buffers = len(pieces)
        return table

    def unregister_buffers(self) -> None:
        """Forget registered buffers, if any. Requests in flight keep theirs; none that is queued may use one."""
        if self._buffers:
            calls.register(self.fd, layout.UNREGISTER_BUFFERS, None, 0)
            self._buffers = 0

    def missing_operations(self) -> list[str]:
        """Names of the operations that kernels.uring needs and this Linux lacks. Raises: OSError."""
        probe = np.zeros(1, layout.PROBE)
        calls.register(self.fd, layout.REGISTER_PROBE, probe, layout.PROBE_OPS_MAX)
        flags = probe[0]["ops"]["flags"]
        return [name for name, opcode in _OPCODES.items() if not flags[opcode] & layout.OP_SUPPORTED]

    def close(self) -> None:
        """Unmap and close the ring. First reap what is in flight: Linux may go on reading and writing its memory."""
        self.record["fd"] = self.record["event_fd"] = -1
        for mapping in self._mappings:
            mapping.close()
        self._mappings.clear()
        for fd in (self.fd, self._event_fd):
            if fd >= 0:
                os.close(fd)
        self.fd = self._event_fd = -1

    def __enter__(self) -> IoUring:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def available() -> str | None:
    """None when rings can be used here; else why not, in a few words."""
    try:
        ring = IoUring.open(1)
    except OSError as error:
        return calls.reason(error)
    with ring:
        try:
            missing = ring.missing_operations()
        except OSError as error:
            return calls.TOO_OLD if error.errno == errno.EINVAL else calls.reason(error)
    return f"this kernel is too old (it has no {', '.join(missing)})" if missing else None
