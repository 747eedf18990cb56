"""The thread that turns kicks into interrupts; kernels/relay.py is what runs in it."""

from __future__ import annotations

import ctypes
import os
import select
import threading
import time

import numpy as np

from kernels import relay_record as layout
from vvupipe.errors import WorkerError
from vvupipe.workers.kernel_library import KernelLibrary

_START_S = 120.0  # the first start on a machine compiles the kernel
_SWITCH_S = 10.0
_EPOLL_CTL_ADD, _EPOLL_CTL_DEL = 1, 2
_ONE = (1).to_bytes(8, "little")
_libc = ctypes.CDLL(None, use_errno=True)


class KickRelay:
    """One thread for all functions of a VM. A route is an eventfd to watch and the one to signal then.

    Neither fd may be closed while its route exists; `remove` returns when the thread has let go of both.
    """

    def __init__(self) -> None:
        """Start the thread and wait until it relays. Raises: WorkerError."""
        self._epoll = select.epoll()
        self._state = np.zeros(1, layout.STATE)
        self._state["one"] = 1
        self._events = np.zeros(layout.EVENTS_MAX, layout.EVENT)
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._control(_EPOLL_CTL_ADD, self._wake, layout.WAKE)
        self._routes = 0
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="kick-relay", daemon=True)
        self._thread.start()
        self._synchronise(_START_S)

    def _run(self) -> None:
        try:
            # SAFETY: these arrays live as long as this object, which joins the thread before it goes.
            state, events = self._state.ctypes.data, self._events.ctypes.data
            status = KernelLibrary("relay").call("relay", self._epoll.fileno(), state, events)
            if status:
                self._failure = WorkerError("it cannot wait for its eventfds any more")
        except BaseException as error:  # `_synchronise` raises it in the thread that waits for this one
            self._failure = error

    @property
    def relayed(self) -> int:
        """Kicks passed on so far."""
        return int(self._state["relayed"][0])

    def add(self, kick_fd: int, signal_fd: int) -> None:
        """Signal `signal_fd` whenever `kick_fd` is. Raises: OSError when it is no fd that can be waited for."""
        self._control(_EPOLL_CTL_ADD, kick_fd, signal_fd)
        self._routes += 1

    def remove(self, kick_fd: int) -> None:
        """End a route; both its fds may be closed afterwards."""
        self._control(_EPOLL_CTL_DEL, kick_fd, 0)
        self._routes -= 1
        self._synchronise(_SWITCH_S)

    def settle(self) -> None:
        """Return once every kick from before has been passed on."""
        # The thread begins to wait after the first time, and has finished what it found then after the second; it
        # finds EVENTS_MAX at most, those that have waited longest.
        for _ in range(2 + self._routes // layout.EVENTS_MAX):
            self._synchronise(_SWITCH_S)

    def _control(self, operation: int, fd: int, signal_fd: int) -> None:
        # Not select.epoll.register: that one always puts the fd itself into the user data.
        event = np.zeros(1, layout.EVENT)
        event["events"], event["data"] = select.EPOLLIN | select.EPOLLET, signal_fd
        if _libc.epoll_ctl(self._epoll.fileno(), operation, fd, ctypes.c_void_p(event.ctypes.data)):
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))

    def _synchronise(self, limit_s: float) -> None:
        """Return once the thread has finished the batch that it may be in. Raises: WorkerError."""
        self._state["asked"] += 1
        asked = self._state["asked"][0]
        os.write(self._wake, _ONE)
        deadline = time.monotonic() + limit_s
        pause = 0.0
        while self._state["seen"][0] != asked:
            if self._failure:
                raise WorkerError(f"the kick relay ended: {self._failure}") from self._failure
            if time.monotonic() > deadline:
                raise WorkerError("the kick relay does not answer")
            time.sleep(pause)
            pause = min(pause + 1e-5, 1e-3)

    def close(self) -> None:
        """Stop the thread; harmless when called again. Raises: WorkerError when it does not stop."""
        if self._epoll.closed:
            return
        self._state["stop"] = 1
        os.write(self._wake, _ONE)
        self._thread.join(_SWITCH_S)
        if self._thread.is_alive():
            raise WorkerError("the kick relay does not stop")
        self._epoll.close()
        os.close(self._wake)
