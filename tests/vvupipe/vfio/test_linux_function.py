"""LinuxVfioFunction against a kernel that is a table of answers; tests/e2e drives real functions with it."""

import os
import struct

import pytest

from vvupipe.errors import TransportError, UserError
from vvupipe.pci.address import PciAddress
from vvupipe.vfio import linux_ioctl as vfio
from vvupipe.vfio.function import IRQ_MSIX
from vvupipe.vfio.linux_container import GroupDomain
from vvupipe.vfio.linux_function import LinuxVfioFunction
from vvupipe.vfio.linux_iommufd import device_node
from vvupipe.vfio.locked_memory import LockedMemory

ADDRESS = PciAddress.parse("0000:00:10.0")
BAR0_AT, BAR2_AT = 0x1000, 0x10000


class Kernel:
    """Keeps what it is told. BAR 0: 4 KiB of registers; BAR 2: 64 KiB, of which the last 32 can be mapped."""

    def __init__(self, flags=vfio.DEVICE_FLAGS_PCI):
        self.flags = flags
        self.told = []

    def ask(self, fd, request, data):
        match request:
            case vfio.DEVICE_GET_INFO:
                return struct.pack("=IIIIII", 24, self.flags, 9, 5, 0, 0)
            case vfio.DEVICE_GET_REGION_INFO:
                return self.region(*struct.unpack_from("=III", data), len(data))
            case vfio.DEVICE_GET_IRQ_INFO:
                index = struct.unpack_from("=III", data)[2]
                return struct.pack("=IIII", 16, 0, index, 3 if index == 2 else 0)
        self.told.append((request, data))
        return data

    def region(self, argsz, flags, index, room):
        if index == 0:
            return struct.pack("=IIIIQQ", 32, 3, 0, 0, 0x1000, BAR0_AT)
        if index == 2:
            head = struct.pack("=IIIIQQ", 72, 3 | 4 | 8, 2, 32, 0x10000, BAR2_AT)
            # Another capability comes first.
            caps = struct.pack("=HHIHHI", 3, 1, 40, 1, 1, 0) + struct.pack("=IIQQ", 1, 0, 0x8000, 0x8000)
            return (head + caps) if room >= 72 else head
        return struct.pack("=IIIIQQ", 32, 0, index, 0, 0, 0)

    def last(self, request):
        return next(data for asked, data in reversed(self.told) if asked == request)


class Domain:
    def __init__(self):
        self.device_fd = os.memfd_create("device")
        os.ftruncate(self.device_fd, 0x20000)
        self.maps = []

    def map(self, iova, address, size_bytes):
        if iova == 0xBAD000:
            raise OSError(12, "no memory")
        self.maps.append((iova, size_bytes))

    def unmap(self, iova, size_bytes):
        self.maps.remove((iova, size_bytes))

    def close(self):
        self.maps.clear()


@pytest.fixture
def kernel(monkeypatch):
    kernel = Kernel()
    monkeypatch.setattr(vfio, "ask", kernel.ask)
    return kernel


@pytest.fixture
def domain():
    return Domain()


@pytest.fixture
def function(kernel, domain):
    function = LinuxVfioFunction("f", domain)
    yield function
    function.close()


def test_registers_lie_in_the_device_fd(function, domain):
    function.write(0, 8, b"abcd")
    assert os.pread(domain.device_fd, 4, BAR0_AT + 8) == b"abcd"
    assert function.read(0, 8, 4) == b"abcd"
    assert [function.region_size(index) for index in (0, 1, 2)] == [0x1000, 0, 0x10000]
    for region, offset in ((0, 0xFFD), (1, 0), (0, 1 << 40)):
        with pytest.raises(TransportError):
            function.read(region, offset, 4)
        with pytest.raises(TransportError):
            function.write(region, offset, b"1234")


def test_mappable_areas(function, domain):
    assert function.mappable_areas(0) == []
    (area,) = function.mappable_areas(2)
    assert (area.offset, area.size_bytes, area.fd_offset) == (0x8000, 0x8000, BAR2_AT + 0x8000)
    assert os.path.sameopenfile(area.fd, domain.device_fd)
    area.close()


def test_a_register_write_by_eventfd(function, kernel):
    fds = [function.io_event(0, 12, (5 << 16 | 3).to_bytes(4, "little")) for _ in range(2)]
    assert os.fstat(fds[0]).st_ino == os.fstat(fds[1]).st_ino
    argsz, flags, offset, data, fd, _ = struct.unpack("=IIQQii", kernel.last(vfio.DEVICE_IOEVENTFD))
    assert (argsz, flags, offset, data) == (32, 4, BAR0_AT + 12, 0x50003)
    os.eventfd_write(fds[0], 1)
    assert os.eventfd_read(fd) == 1
    assert sum(request == vfio.DEVICE_IOEVENTFD for request, _ in kernel.told) == 1
    for fd in fds:
        os.close(fd)


def test_interrupts(function, kernel):
    assert function.irq_count(IRQ_MSIX) == 3
    function.set_irq_eventfds(IRQ_MSIX, 0, [7, -1, 9])
    data = kernel.last(vfio.DEVICE_SET_IRQS)
    assert struct.unpack("=IIIII3i", data) == (32, 4 | 32, 2, 0, 3, 7, -1, 9)
    function.disable_irqs(IRQ_MSIX)
    assert struct.unpack("=IIIII", kernel.last(vfio.DEVICE_SET_IRQS)) == (20, 1 | 32, 2, 0, 0)


def test_dma(function, domain):
    memory = LockedMemory(1 << 16, 1 << 20)
    memory.view[:4] = b"ring"
    function.dma_map(memory.gpa, memory.size_bytes, memory.fd, memory.fd_offset)
    assert domain.maps == [(1 << 20, 1 << 16)]
    function.dma_unmap(memory.gpa, memory.size_bytes)
    assert domain.maps == []
    with pytest.raises(TransportError):
        function.dma_unmap(memory.gpa, memory.size_bytes)
    with pytest.raises(TransportError, match="cannot be mapped for DMA"):
        function.dma_map(0xBAD000, 4096, memory.fd, 0)
    memory.close()
    memory.close()


def test_reset_only_where_there_is_one(kernel, domain):
    function = LinuxVfioFunction("f", domain)
    with pytest.raises(TransportError, match="cannot be reset"):
        function.reset()
    kernel.flags |= vfio.DEVICE_FLAGS_RESET
    function.close()
    other = LinuxVfioFunction("f", Domain())
    other.reset()
    assert kernel.last(vfio.DEVICE_RESET) == b""
    other.close()


def test_after_its_end_a_function_answers_nothing(function):
    function.close()
    for call in (lambda: function.read(0, 0, 4), lambda: function.irq_count(2), lambda: function.dma_unmap(0, 1)):
        with pytest.raises(TransportError):
            call()


def test_what_is_no_pci_function(kernel):
    kernel.flags = 0
    with pytest.raises(UserError, match="no PCI function"):
        LinuxVfioFunction("f", Domain())


def test_groups_that_cannot_be_had(tmp_path):
    with pytest.raises(UserError, match="modprobe vfio-pci"):
        GroupDomain(ADDRESS, 7, tmp_path)


def test_the_device_s_own_node(tmp_path):
    devices, dev = tmp_path / "devices", tmp_path / "dev"
    (devices / str(ADDRESS) / "vfio-dev" / "vfio3").mkdir(parents=True)
    assert device_node(ADDRESS, devices, dev) is None
    (dev / "vfio" / "devices").mkdir(parents=True)
    node = dev / "vfio" / "devices" / "vfio3"
    node.write_text("")
    assert device_node(ADDRESS, devices, dev) is None
    (dev / "iommu").write_text("")
    assert device_node(ADDRESS, devices, dev) == node
