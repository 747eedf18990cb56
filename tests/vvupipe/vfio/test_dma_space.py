import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vvupipe.errors import ProtocolError
from vvupipe.vfio.dma_space import DmaSpace


@pytest.fixture
def memfd():
    fd = os.memfd_create("dma")
    os.ftruncate(fd, 1 << 16)
    yield fd
    os.close(fd)


def test_view_is_the_client_s_memory(memfd):
    dma = DmaSpace()
    dma.map(0x1000, 0x2000, memfd, 0x1000, writable=True)
    dma.view(0x1800, 4)[:] = b"1234"
    assert os.pread(memfd, 4, 0x1800) == b"1234"
    dma.clear()
    with pytest.raises(ProtocolError, match="not mapped for DMA"):
        dma.view(0x1800, 4)


@pytest.mark.parametrize(("address", "size"), [(0xFFF, 2), (0x2FFF, 2), (0x5000, 1), (0, 0x10000)])
def test_view_must_lie_in_one_mapping(memfd, address, size):
    dma = DmaSpace()
    dma.map(0x1000, 0x2000, memfd, 0, writable=True)
    dma.map(0x3000, 0x1000, memfd, 0, writable=False)
    with pytest.raises(ProtocolError):
        dma.view(address, size)


def test_memory_that_cannot_be_written_or_mapped(memfd):
    dma = DmaSpace()
    dma.map(0x1000, 0x1000, memfd, 0, writable=False)
    dma.map(0x2000, 0x1000, None, 0, writable=True)
    assert dma.view(0x1000, 4).readonly
    with pytest.raises(ProtocolError, match="without a file"):
        dma.view(0x2000, 4)


def test_unmap_while_a_view_is_alive(memfd):
    dma = DmaSpace()
    dma.map(0, 0x1000, memfd, 0, writable=True)
    view = dma.view(0, 4)
    dma.unmap(0, 0x1000)
    view[:] = b"kept"  # its memory stays until the view goes
    assert os.pread(memfd, 4, 0) == b"kept"


def test_unmapping_a_range_takes_all_mappings_in_it(memfd):
    dma = DmaSpace()
    for page in (5, 1, 2, 9):
        dma.map(page << 12, 0x1000, memfd, page << 12, writable=True)
    with pytest.raises(OSError, match="a part of"):
        dma.unmap(0x1800, 0x4000)
    dma.unmap(0x3000, 0x2000)  # nothing there
    dma.unmap(0, 0x4000)
    assert not dma.overlaps(0, 0x5000)
    dma.view(0x5000, 4)[:] = b"five"
    assert os.pread(memfd, 4, 0x5000) == b"five"
    dma.unmap(0, 1 << 64)
    assert not dma.overlaps(0, 1 << 64)


@given(
    steps=st.lists(st.tuples(st.booleans(), st.integers(0, 15), st.integers(1, 6)), max_size=40),
)
def test_against_a_list_of_pages(steps):
    fd = os.memfd_create("dma")
    os.ftruncate(fd, 32 << 12)
    dma = DmaSpace()
    owner = [None] * 32  # which mapping has each page
    for number, (mapping, page, count) in enumerate(steps):
        pages = owner[page : page + count]
        try:
            if mapping:
                dma.map(page << 12, count << 12, fd, page << 12, writable=True)
                assert not any(o is not None for o in pages)
                owner[page : page + count] = [number] * count
            else:
                dma.unmap(page << 12, count << 12)
                inside = {o for o in pages if o is not None}
                assert not inside & {o for k, o in enumerate(owner) if not page <= k < page + count}
                owner[page : page + count] = [None] * count
        except OSError:
            inside = {o for o in pages if o is not None}
            cut = inside & {o for k, o in enumerate(owner) if not page <= k < page + count}
            assert inside if mapping else cut
    for k, o in enumerate(owner):
        assert dma.overlaps(k << 12, 0x1000) is (o is not None)
    dma.clear()
    os.close(fd)
