import asyncio
import os

import pytest

from vvupipe.errors import TransportError
from vvupipe.pci.address import PciAddress
from vvupipe.vvu import layout, memory_windows, region_table
from vvupipe.vvu.memory_windows import MemoryWindows
from vvupipe.vvu.region_table import Piece

HERE = PciAddress.parse("0000:00:10.0")


def show(folder, size=8192, enable="0"):
    folder.mkdir(parents=True)
    (folder / "enable").write_text(enable)
    (folder / "resource2").write_bytes(bytes(size))


def areas(devices, *pieces):
    return asyncio.run(MemoryWindows(HERE, devices).areas(pieces))


def test_windows_on_the_bus_and_behind_a_port(tmp_path):
    show(tmp_path / "0000:00:01.0")
    show(tmp_path / "0000:00:02.3" / "0000:07:00.0")
    found = areas(
        tmp_path,
        Piece(0, 4096, 4096, layout.WINDOW_ON_BUS, 1 << 3),
        Piece(4096, 8192, 0, layout.WINDOW_BEHIND_PORT, 2 << 3 | 3),
    )
    assert [(a.offset, a.size_bytes, a.fd_offset) for a in found] == [(0, 4096, 4096), (4096, 8192, 0)]
    assert os.path.samestat(os.fstat(found[1].fd), (tmp_path / "0000:00:02.3/0000:07:00.0/resource2").stat())
    assert (tmp_path / "0000:00:01.0" / "enable").read_text() == "1"
    for area in found:
        area.close()


def test_a_window_is_waited_for(tmp_path):
    async def test():
        waiting = asyncio.create_task(
            MemoryWindows(HERE, tmp_path).areas([Piece(0, 8192, 0, layout.WINDOW_BEHIND_PORT, 3 << 3)])
        )
        await asyncio.sleep(0.05)
        assert not waiting.done()
        show(tmp_path / "0000:00:03.0" / "0000:01:00.0", size=4096)  # the one that was there before
        await asyncio.sleep(0.05)
        assert not waiting.done()
        (tmp_path / "0000:00:03.0/0000:01:00.0/resource2").write_bytes(bytes(8192))
        (await waiting)[0].close()

    asyncio.run(test())


def test_a_window_that_does_not_come(tmp_path, monkeypatch):
    monkeypatch.setattr(memory_windows, "_APPEAR_S", 0.05)
    with pytest.raises(TransportError, match=r"behind the port at 0000:00:03\.0 does not appear"):
        areas(tmp_path, Piece(0, 4096, 0, layout.WINDOW_BEHIND_PORT, 3 << 3))
    with pytest.raises(TransportError, match="a place 9"):
        areas(tmp_path, Piece(0, 4096, 0, 9, 3 << 3))


def test_the_table_s_bytes():
    pieces = [Piece(0, 1, 2, 1, 4), Piece(1 << 40, 1 << 33, 5, 2, 6)]
    data = region_table.pack(pieces)
    assert data[:16] == bytes((2,)) + bytes(15)
    assert data[16:48] == b"".join(n.to_bytes(w, "little") for n, w in ((0, 8), (1, 8), (2, 8), (1, 4), (4, 4)))
    assert region_table.unpack_count(data[:16]) == 2
    assert region_table.unpack_entries(data[16:]) == pieces
    with pytest.raises(ValueError, match="holds 127"):
        region_table.pack(pieces[:1] * 128)
    with pytest.raises(TransportError):
        region_table.unpack_count(b"\xff" * 16)
