"""What the relay of kicks and the control plane share (kernels/relay.py). Plain, no numba."""

import platform

import numpy as np

#: epoll_event: le32 events, 64-bit user data; packed on x86-64, aligned elsewhere (linux/eventpoll.h)
EVENT = np.dtype([("events", "<u4"), ("data", "<u8")], align=platform.machine() != "x86_64")
EVENT_BYTES = EVENT.itemsize
EVENTS_MAX = 64

#: What both sides of the relay share, in memory of this process.
STATE = np.dtype(
    [
        ("asked", "<u4"),  # counted up by the control plane
        ("seen", "<u4"),  # the last `asked` that the thread saw between two batches
        ("stop", "<u4"),
        ("_pad", "<u4"),
        ("relayed", "<u8"),
        ("one", "<u8"),  # a 64-bit 1, what is written to an eventfd
    ]
)

WAKE = 0xFFFFFFFF  #: user data of the eventfd by which the control plane makes itself heard
