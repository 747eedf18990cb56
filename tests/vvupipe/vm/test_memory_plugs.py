"""Which windows are plugged in for which memory; QEMU is a fake that notes what it is told."""

import asyncio
import fcntl
import os

import pytest

from vvupipe.errors import ProtocolError
from vvupipe.vfio.function import MappableArea
from vvupipe.vm import memory_plugs
from vvupipe.vm.memory_plugs import MemoryPlugs, Window
from vvupipe.vm.qemu_monitor import QemuRefused
from vvupipe.vm.sibling_memory import MemoryPool, SiblingMemory
from vvupipe.vvu import layout
from vvupipe.vvu.region_table import Piece

F_ADD_SEALS, F_SEAL_SHRINK, F_SEAL_GROW = 1033, 2, 4
MIB = 1 << 20
PORTS = [("port0.0", 0x18), ("port0.1", 0x19), ("port0.2", 0x1A)]


class Qemu:
    """Answers as QEMU does; `refuse` names a command that fails."""

    def __init__(self):
        self.listeners = []
        self.objects = {}
        self.devices = {}
        self.refuse = None
        self.holds_on = False

    async def execute(self, command, **arguments):
        await asyncio.sleep(0)
        if command == self.refuse:
            raise QemuRefused(f"QEMU refused {command}: because")
        match command:
            case "object-add":
                status = os.stat(arguments["mem-path"])
                assert arguments.get("offset", 0) + arguments["size"] <= status.st_size
                assert arguments["size"] & (arguments["size"] - 1) == 0
                self.objects[arguments["id"]] = (status.st_ino, arguments.get("offset", 0), arguments["size"])
            case "device_add":
                assert arguments["bus"] not in {bus for bus, _ in self.devices.values()}
                self.devices[arguments["id"]] = (arguments["bus"], arguments["memdev"])
            case "device_del":
                if not self.holds_on:
                    del self.devices[arguments["id"]]
                    for listener in self.listeners:
                        listener("DEVICE_DELETED", {"device": arguments["id"]})
            case "object-del":
                assert arguments["id"] not in {memory for _, memory in self.devices.values()}
                del self.objects[arguments["id"]]

    def shown(self):
        return sorted(self.objects[memory][1:] for _, memory in self.devices.values())


@pytest.fixture
def qemu():
    return Qemu()


@pytest.fixture
def memfd():
    fds = []

    def make(size, sealed=False):
        fds.append(os.memfd_create("ram", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC))
        os.ftruncate(fds[-1], size)
        if sealed:
            fcntl.fcntl(fds[-1], F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW)
        return fds[-1]

    yield make
    for fd in fds:
        os.close(fd)


def run(work):
    return asyncio.run(work())


def test_a_power_of_two_is_one_window(qemu, memfd):
    async def test():
        plugs = MemoryPlugs(qemu, (7, 2, 0), PORTS)
        assert await plugs.show(memfd(256 * MIB, sealed=True), 256 * MIB) == [Window(0, 256 * MIB, 0x18)]
        assert qemu.shown() == [(0, 256 * MIB)]
        await plugs.close()

    run(test)


def test_an_unsealed_file_is_rounded_up(qemu, memfd):
    async def test():
        fd = memfd(384 * MIB)
        plugs = MemoryPlugs(qemu, (7, 2, 0), PORTS)
        assert await plugs.show(fd, 384 * MIB) == [Window(0, 512 * MIB, 0x18)]
        assert os.fstat(fd).st_size == 512 * MIB
        await plugs.close()

    run(test)


def test_a_sealed_file_is_cut_where_qemu_can(qemu, memfd):
    async def test():
        fd = memfd(384 * MIB, sealed=True)
        plugs = MemoryPlugs(qemu, (8, 1, 0), PORTS)
        assert await plugs.show(fd, 384 * MIB) == [
            Window(0, 256 * MIB, 0x18),
            Window(256 * MIB, 128 * MIB, 0x19),
        ]
        assert qemu.shown() == [(0, 256 * MIB), (256 * MIB, 128 * MIB)]
        await plugs.close()

    run(test)


def test_a_sealed_file_is_refused_where_qemu_cannot(qemu, memfd):
    async def test():
        plugs = MemoryPlugs(qemu, (7, 2, 0), PORTS)
        with pytest.raises(ProtocolError, match=r"-m 512M.*seal=off"):
            await plugs.show(memfd(384 * MIB, sealed=True), 384 * MIB)
        assert qemu.objects == {}
        await plugs.close()

    run(test)


def test_only_what_is_used_of_a_file_is_shown(qemu, memfd):
    async def test():
        plugs = MemoryPlugs(qemu, (7, 2, 0), PORTS)
        fd = memfd(384 * MIB, sealed=True)
        assert await plugs.show(fd, 100 * MIB) == [Window(0, 128 * MIB, 0x18)]
        # More of it than before: the window is made anew.
        with pytest.raises(ProtocolError):
            await plugs.show(fd, 300 * MIB)
        await plugs.close()

    run(test)


def test_a_front_end_that_comes_back_finds_its_window(qemu, memfd, monkeypatch):
    async def test():
        monkeypatch.setattr(memory_plugs, "_LINGER_S", 0.05)
        plugs = MemoryPlugs(qemu, (7, 2, 0), PORTS)
        fd = memfd(4 * MIB)
        first = await plugs.show(fd, 4 * MIB)
        plugs.hide(first)
        assert await plugs.show(fd, 4 * MIB) is first
        await asyncio.sleep(0.1)
        assert qemu.shown() == [(0, 4 * MIB)]
        plugs.hide(first)
        await asyncio.sleep(0.1)
        assert (qemu.devices, qemu.objects) == ({}, {})
        await plugs.close()

    run(test)


def test_idle_windows_make_room_and_used_ones_do_not(qemu, memfd):
    async def test():
        plugs = MemoryPlugs(qemu, (7, 2, 0), PORTS)
        windows = [await plugs.show(memfd((1 + k) * MIB), MIB) for k in range(3)]
        with pytest.raises(ProtocolError, match="0 of 3 hot-plug ports free"):
            await plugs.show(memfd(8 * MIB), MIB)
        plugs.hide(windows[1])
        assert await plugs.show(memfd(8 * MIB), MIB) == [Window(0, MIB, 0x19)]
        await plugs.close()

    run(test)


def test_a_port_that_the_guest_does_not_free_stays_taken(qemu, memfd, monkeypatch):
    async def test():
        monkeypatch.setattr(memory_plugs, "_LINGER_S", 0.0)
        monkeypatch.setattr(memory_plugs, "_DELETED_S", 0.05)
        plugs = MemoryPlugs(qemu, (7, 2, 0), PORTS[:1])
        qemu.holds_on = True
        plugs.hide(await plugs.show(memfd(MIB), MIB))
        await asyncio.sleep(0.2)
        with pytest.raises(ProtocolError, match="0 of 1"):
            await plugs.show(memfd(MIB), MIB)
        await plugs.close()

    run(test)


@pytest.mark.parametrize("command", ["object-add", "device_add"])
def test_what_qemu_refuses_leaves_nothing(qemu, memfd, command):
    async def test():
        plugs = MemoryPlugs(qemu, (8, 1, 0), PORTS)
        qemu.refuse = command
        with pytest.raises(ProtocolError, match="because"):
            await plugs.show(memfd(MIB), MIB)
        assert (qemu.devices, qemu.objects) == ({}, {})
        qemu.refuse = None
        assert await plugs.show(memfd(MIB), MIB) == [Window(0, MIB, 0x18)]
        await plugs.close()

    run(test)


def area(bar_offset, size, fd, offset):
    return MappableArea(bar_offset, size, os.dup(fd), offset)


def test_pieces_of_the_pool_and_of_windows(qemu, memfd):
    async def test():
        pool = MemoryPool("test", 0, 1 << 30)
        plugs = MemoryPlugs(qemu, (8, 1, 0), PORTS)
        memory = SiblingMemory(plugs, pool, 0x10)
        fd = memfd(3 * MIB, sealed=True)
        regions = [
            area(0, 64 * MIB, pool.fd, 0),
            area(64 * MIB, 3 * MIB - 4096, fd, 4096),
            area(67 * MIB - 4096, MIB, pool.fd, 64 * MIB),
        ]
        assert await memory.place(regions) == [
            Piece(0, 64 * MIB, 0, layout.WINDOW_ON_BUS, 0x10),
            Piece(64 * MIB, 2 * MIB - 4096, 4096, layout.WINDOW_BEHIND_PORT, 0x18),
            Piece(66 * MIB - 4096, MIB, 0, layout.WINDOW_BEHIND_PORT, 0x19),
            Piece(67 * MIB - 4096, MIB, 64 * MIB, layout.WINDOW_ON_BUS, 0x10),
        ]
        memory.forget()
        for each in regions:
            each.close()
        await plugs.close()
        pool.close()
        assert not pool.path.exists()

    run(test)


def test_a_table_that_cannot_be_shown_leaves_the_former_one(qemu, memfd):
    async def test():
        pool = MemoryPool("test", 0, 1 << 30)
        plugs = MemoryPlugs(qemu, (7, 2, 0), PORTS)
        memory = SiblingMemory(plugs, pool, 0x10)
        good, sealed = area(0, MIB, memfd(MIB), 0), area(2 * MIB, 3 * MIB, memfd(3 * MIB, sealed=True), 0)
        new = area(0, 2 * MIB, memfd(2 * MIB), 0)
        pieces = await memory.place([good])
        with pytest.raises(ProtocolError, match="no power of two"):
            await memory.place([new, sealed])
        assert await memory.place([good]) == pieces
        shown = [(plug.windows[0].size_bytes, plug.users) for plug in plugs._plugs.values()]
        assert sorted(shown) == [(MIB, 1), (2 * MIB, 0)]
        for each in (good, sealed, new):
            each.close()
        await plugs.close()
        pool.close()

    run(test)


def test_as_many_idle_windows_go_as_the_new_memory_needs_ports(qemu, memfd, monkeypatch):
    async def test():
        monkeypatch.setattr(memory_plugs, "_LINGER_S", 60.0)
        plugs = MemoryPlugs(qemu, (8, 1, 0), PORTS)
        for _ in PORTS:
            plugs.hide(await plugs.show(memfd(4 * MIB), 4 * MIB))
        assert len(await plugs.show(memfd(384 * MIB, sealed=True), 384 * MIB)) == 2
        assert qemu.shown() == [(0, 4 * MIB), (0, 256 * MIB), (256 * MIB, 128 * MIB)]
        await plugs.close()

    run(test)


def test_a_port_that_the_guest_lets_go_of_late_is_free_again(qemu, memfd, monkeypatch):
    async def test():
        monkeypatch.setattr(memory_plugs, "_LINGER_S", 0.01)
        monkeypatch.setattr(memory_plugs, "_DELETED_S", 0.05)
        plugs = MemoryPlugs(qemu, (7, 2, 0), PORTS[:1])
        plugs.hide(await plugs.show(memfd(4 * MIB), 4 * MIB))
        qemu.holds_on = True
        await asyncio.sleep(0.2)
        with pytest.raises(ProtocolError, match="0 of 1 hot-plug ports free"):
            await plugs.show(memfd(8 * MIB), 8 * MIB)
        qemu.holds_on = False
        await qemu.execute("device_del", id="window1")
        await asyncio.sleep(0.05)
        assert await plugs.show(memfd(8 * MIB), 8 * MIB) == [Window(0, 8 * MIB, PORTS[0][1])]
        assert qemu.shown() == [(0, 8 * MIB)]
        await plugs.close()

    run(test)
