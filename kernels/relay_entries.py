"""What the thread of a kick relay calls (see object_file)."""

from numba import int32, int64

from kernels import relay as kernel


def relay(epoll_fd, state, events):
    """relay.relay."""
    return int64(kernel.relay(int32(epoll_fd), state, events))


ENTRIES = (relay,)
