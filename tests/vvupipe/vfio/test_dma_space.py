import os

import pytest

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
    for address in (0x1000, 0x2000):
        with pytest.raises(ProtocolError, match="not mapped for writing"):
            dma.view(address, 4)


def test_unmap_while_a_view_is_alive(memfd):
    dma = DmaSpace()
    dma.map(0, 0x1000, memfd, 0, writable=True)
    view = dma.view(0, 4)
    dma.unmap(0, 0x1000)
    view[:] = b"kept"  # its memory stays until the view goes
    assert os.pread(memfd, 4, 0) == b"kept"
