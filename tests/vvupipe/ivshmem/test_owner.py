import mmap
import os
import signal
import subprocess
import sys
import time

import pytest

from vvupipe.ivshmem import layout
from vvupipe.ivshmem.owner import Ownership, OwnerWatch
from vvupipe.memory.mapping import Mapping

OWNER = """
import sys, time
from vvupipe.ivshmem import layout
from vvupipe.ivshmem.owner import Ownership
from vvupipe.memory.mapping import Mapping
mapping = Mapping(int(sys.argv[1]), layout.MEMORY_BYTES)
ownership = Ownership(mapping.view, mapping.address)
print("owned", flush=True)
sys.stdin.readline()
ownership.close()
"""


@pytest.fixture
def memory():
    fd = os.memfd_create("shared")
    os.ftruncate(fd, layout.MEMORY_BYTES)
    with mmap.mmap(fd, layout.MEMORY_BYTES) as mapped:
        view = memoryview(mapped)
        yield fd, view
        view.release()
    os.close(fd)


def owner(fd):
    process = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(fd)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=[fd], text=True
    )
    assert process.stdout.readline() == "owned\n"
    return process


def test_a_killed_owner_is_noticed_once(memory):
    fd, view = memory
    watch = OwnerWatch(view)
    with owner(fd) as process:
        assert not watch.died()
        process.send_signal(signal.SIGKILL)
        process.wait(10)
        assert watch.died()
        assert not watch.died()
    watch.close()


def test_an_owner_that_ends_in_order_did_not_die(memory):
    fd, view = memory
    watch = OwnerWatch(view)
    with owner(fd) as process:
        process.communicate("\n", 10)
        assert not watch.died()
    watch.close()


def test_the_word_names_a_living_thread(memory):
    fd, _ = memory
    mapping = Mapping(fd, layout.MEMORY_BYTES)
    word = mapping.view[layout.OWNER_OFFSET : layout.OWNER_OFFSET + 4].cast("I")
    ownership = Ownership(mapping.view, mapping.address)
    assert os.path.exists(f"/proc/self/task/{word[0]}")
    ownership.close()
    deadline = time.monotonic() + 5
    while word[0] and time.monotonic() < deadline:
        time.sleep(0.001)
    assert word[0] == 0
    ownership.close()
    word.release()
    mapping.close()
