import os
import select
import time

import pytest

from vvupipe.vvu.kick_relay import KickRelay


@pytest.fixture(scope="module")
def relay():
    relay = KickRelay()
    yield relay
    relay.close()


@pytest.fixture
def fds():
    fds = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(6)]
    yield fds
    for fd in fds:
        os.close(fd)


def signalled(fd, timeout_s=5):
    return bool(select.select([fd], [], [], timeout_s)[0]) and os.eventfd_read(fd)


def test_every_kick_is_told(relay, fds):
    kick, target, *_ = fds
    relay.add(kick, target)
    before = relay.relayed
    for _ in range(50):
        os.eventfd_write(kick, 1)
        assert signalled(target)
    deadline = time.monotonic() + 5
    while relay.relayed < before + 50:  # it counts when it has told
        assert time.monotonic() < deadline
    relay.remove(kick)
    os.eventfd_write(kick, 1)
    assert not signalled(target, 0.1)


def test_kick_from_before_the_route_is_told(relay, fds):
    kick, target, *_ = fds
    os.eventfd_write(kick, 1)
    relay.add(kick, target)
    assert signalled(target)
    relay.remove(kick)


def test_what_was_kicked_before_is_told_when_it_has_settled(relay, fds):
    kick, signal = fds[:2]
    relay.add(kick, signal)
    for k in range(200):
        os.eventfd_write(kick, 1)
        relay.settle()
        assert os.eventfd_read(signal) == 1, k
    relay.remove(kick)


def test_two_vrings_that_share_an_eventfd_are_both_told(relay, fds):
    kick, first, second, *_ = fds
    other = os.dup(kick)
    relay.add(kick, first)
    relay.add(other, second)
    for _ in range(20):
        os.eventfd_write(kick, 1)
        assert signalled(first)
        assert signalled(second)
    relay.remove(kick)
    relay.remove(other)
    os.close(other)


def test_target_whose_counter_is_full_holds_nobody_up(relay, fds):
    kick, full, other_kick, target, *_ = fds
    os.eventfd_write(full, (1 << 64) - 2)
    relay.add(kick, full)
    relay.add(other_kick, target)
    os.eventfd_write(kick, 1)
    os.eventfd_write(other_kick, 1)
    assert signalled(target)
    relay.remove(kick)
    relay.remove(other_kick)


def test_fd_numbers_can_be_used_again_right_after_removal(relay, fds):
    """An old event that still found its route would signal whatever has the number now."""
    kick, bystander, *_ = fds
    for _ in range(200):
        target = os.eventfd(0, os.EFD_NONBLOCK)
        relay.add(kick, target)
        os.eventfd_write(kick, 1)
        relay.remove(kick)
        os.dup2(bystander, target)  # the number now means something else
        os.close(target)
    assert not signalled(bystander, 0.05)


def test_what_cannot_be_waited_for(relay, tmp_path):
    with open(tmp_path / "file", "w+") as file, pytest.raises(PermissionError):
        relay.add(file.fileno(), 1)
    with pytest.raises(OSError, match="Bad file descriptor"):
        relay.add(9999, 1)


def test_close_ends_the_thread():
    relay = KickRelay()
    relay.close()
    relay.close()
    assert not relay._thread.is_alive()
