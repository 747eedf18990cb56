import os

import pytest

from vvupipe.errors import ProtocolError
from vvupipe.memory.region import MemoryRegion
from vvupipe.vvu.shared_memory_bar import SharedMemoryBar


def region(size, content, fd_offset=0, gpa=0x1000):
    fd = os.memfd_create("sibling")
    os.ftruncate(fd, fd_offset + size)
    os.pwrite(fd, content, fd_offset)
    return MemoryRegion(gpa, size, 0x7F0000000000, fd, fd_offset)


@pytest.fixture
def bar():
    bar = SharedMemoryBar(1 << 20)
    bar.commit(bar.plan_table([region(8192, b"first"), region(4096, b"second", 4096)]))
    yield bar
    bar.clear()


def test_regions_lie_one_after_another(bar):
    assert [(a.offset, a.size_bytes, a.fd_offset) for a in bar.areas] == [(0, 8192, 0), (8192, 4096, 4096)]
    assert bar.read(0, 5) == b"first"
    assert bar.read(8190, 8) == b"\0\0second"
    assert bar.read(12280, 100) == bytes(100)


def test_write_through_the_bar_is_in_the_sibling_s_memory(bar):
    bar.write(8190, b"abcdef")
    assert os.pread(bar.areas[0].fd, 2, 8190) == b"ab"
    assert os.pread(bar.areas[1].fd, 4, 4096) == b"cdef"
    bar.write(12284, b"12345678")  # half of it is where there is no memory
    assert bar.read(12284, 8) == b"1234" + bytes(4)


def test_file_that_was_truncated(bar):
    os.ftruncate(bar.areas[0].fd, 0)
    assert bar.read(0, 5) == bytes(5)
    bar.write(0, b"lost")
    assert os.fstat(bar.areas[0].fd).st_size == 0


def test_more_than_fits_is_refused_and_the_former_stays(bar):
    large = region(1 << 20, b"x")
    extra = region(4096, b"y")
    with pytest.raises(ProtocolError, match="do not fit"):
        bar.plan_table([large, extra])
    assert bar.read(0, 5) == b"first"
    large.close()
    extra.close()


def test_filling_again_closes_the_former_fds(bar):
    old = [area.fd for area in bar.areas]
    inodes = [os.fstat(fd).st_ino for fd in old]
    bar.commit(bar.plan_table([region(4096, b"new")]))
    open_inodes = [os.stat(f"/proc/self/fd/{fd}").st_ino for fd in old if os.path.exists(f"/proc/self/fd/{fd}")]
    assert not set(inodes) & set(open_inodes)
    assert bar.read(0, 3) == b"new"


def test_slots_come_and_go(bar):
    slot = region(4096, b"slot", gpa=0x10000)
    plan, offset = bar.plan_slot(slot)
    assert offset == 12288, "behind the table"
    bar.commit(plan)
    assert bar.read(offset, 4) == b"slot"
    with pytest.raises(ProtocolError, match="already"):
        bar.plan_slot(region(4096, b"same place", gpa=0x10000))
    key = (slot.gpa, slot.uva, slot.size_bytes)
    bar.commit(bar.plan_removal(key))
    assert bar.read(offset, 4) == bytes(4)
    with pytest.raises(ProtocolError, match="no memory slot"):
        bar.plan_removal(key)


def test_what_is_no_guest_memory_stays_when_the_table_changes(bar):
    log = region(4096, b"log", 100)
    plan, offset = bar.plan_extra("log", log.fd, 64, 100)
    bar.commit(plan)
    assert offset == (1 << 20) * 7 // 8 + 100, "the upper eighth; the page that it lies in"
    bar.commit(bar.plan_table([region(4096, b"new")]))
    assert bar.read(offset, 3) == b"log"
    other = region(4096, b"other")
    plan, second = bar.plan_extra("log", other.fd, 64, 0)
    assert second != offset, "the former one keeps its place until then"
    bar.commit(plan)
    assert bar.read(second, 5) == b"other"
    assert len(bar.areas) == 2


def test_plan_that_is_not_carried_out_changes_nothing(bar):
    before = list(bar.areas)
    slot = region(4096, b"slot", gpa=0x10000)
    bar.plan_slot(slot)
    assert bar.areas == before
    slot.close()
