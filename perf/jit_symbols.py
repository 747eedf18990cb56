"""Where the JIT-compiled kernels of a running process are: names, addresses and sizes, read from outside.

LLVM tells debuggers of every object that it loads (GDB manual, "JIT Compilation Interface"): a linked list of ELF
images in the process's memory, which hangs on the symbol __jit_debug_descriptor of libllvmlite.so. It is there whether
a kernel was compiled or came from numba's cache, so a worker needs no preparation.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_LIBRARY = "libllvmlite.so"
_DESCRIPTOR = b"__jit_debug_descriptor"
_DESCRIPTOR_FORMAT = struct.Struct("<IIQQ")  # version, action, relevant entry, first entry
_ENTRY_FORMAT = struct.Struct("<QQQQ")  # next, previous, address of the image, its size
_ENTRIES_MAX = 100_000
# ELF-64 (System V ABI): section headers, symbols.
_SECTION = struct.Struct("<IIQQQQIIQQ")
_SYMBOL = struct.Struct("<IBBHQQ")
_SHT_SYMTAB, _STT_FUNC = 2, 2
_PT_LOAD = 1


class NoJit(Exception):
    """The process has no JIT-compiled code that can be found. The message is one line."""


@dataclass(frozen=True)
class Symbol:
    """A function in the process's memory."""

    start: int
    size: int
    name: str


class Elf:
    """As much of an ELF-64 file as it takes to list its functions."""

    def __init__(self, data: bytes) -> None:
        if data[:5] != b"\x7fELF\x02":
            raise NoJit("an object that is no ELF-64 file")
        self._data = data
        (offset,) = struct.unpack_from("<Q", data, 40)
        size, count = struct.unpack_from("<HH", data, 58)
        self._sections = [_SECTION.unpack_from(data, offset + k * size) for k in range(count)]

    def symbols(self) -> Iterator[tuple[str, int, int, int, int]]:
        """(name, type, section index, value, size) of each symbol."""
        for section in self._sections:
            if section[1] != _SHT_SYMTAB:
                continue
            names = self._sections[section[6]][4]
            for offset in range(section[4], section[4] + section[5], _SYMBOL.size):
                name, info, _, index, value, size = _SYMBOL.unpack_from(self._data, offset)
                end = self._data.index(b"\0", names + name)
                yield self._data[names + name : end].decode(errors="replace"), info & 15, index, value, size

    def section_address(self, index: int) -> int:
        """Where a section was loaded; 0 when the index is none (absolute symbols)."""
        return int(self._sections[index][3]) if index < len(self._sections) else 0

    def load_bias_address(self) -> tuple[int, int]:
        """(file offset, address) of the first loaded segment."""
        (offset,) = struct.unpack_from("<Q", self._data, 32)
        size, count = struct.unpack_from("<HH", self._data, 54)
        for k in range(count):
            kind, _, file_offset, address = struct.unpack_from("<IIQQ", self._data, offset + k * size)
            if kind == _PT_LOAD:
                return file_offset, address
        raise NoJit(f"{_LIBRARY} has no segment")


def readable_name(symbol: str) -> str:
    """kernels.blk_queue.serve_ring of the mangled _ZN7kernels9blk_queue10serve_ringB2v1B..., else the name itself."""
    if not symbol.startswith("_ZN"):
        return symbol
    position, parts = 3, []
    while found := re.match(r"\d+", symbol[position:]):
        start = position + found.end()
        length = int(found[0])
        parts.append(symbol[start : start + length])
        position = start + length
    text = ".".join(part for part in parts if part)
    # numba escapes what is no identifier as _xx and adds the dispatcher's number.
    text = re.sub(r"_([0-9a-f]{2})", lambda match: chr(int(match[1], 16)), text) if "_2e" in text else text
    return text or symbol


def _descriptor_address(pid: int) -> int:
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        words = line.split(None, 5)
        if len(words) == 6 and words[5].endswith(_LIBRARY) and int(words[2], 16) == 0:
            library = Elf(Path(f"/proc/{pid}/root{words[5]}").read_bytes())
            file_offset, address = library.load_bias_address()
            bias = int(words[0].split("-")[0], 16) - (address - file_offset)
            for name, _, _, value, _ in library.symbols():
                if name.encode() == _DESCRIPTOR:
                    return bias + value
            raise NoJit(f"{_LIBRARY} was stripped of its symbols")
    raise NoJit(f"process {pid} has not loaded {_LIBRARY}: it runs no kernels")


def symbols_of(pid: int) -> list[Symbol]:
    """Every JIT-compiled function of a process, by address. Raises: NoJit; OSError without the right to look."""
    descriptor = _descriptor_address(pid)
    found: dict[int, Symbol] = {}
    with Path(f"/proc/{pid}/mem").open("rb", buffering=0) as memory:

        def read(address: int, size: int) -> bytes:
            memory.seek(address)
            return memory.read(size)

        entry = _DESCRIPTOR_FORMAT.unpack(read(descriptor, _DESCRIPTOR_FORMAT.size))[3]
        for _ in range(_ENTRIES_MAX):
            if not entry:
                break
            entry, _, image, size = _ENTRY_FORMAT.unpack(read(entry, _ENTRY_FORMAT.size))
            elf = Elf(read(image, size))
            for name, kind, index, value, length in elf.symbols():
                if kind == _STT_FUNC and length and index:
                    start = elf.section_address(index) + value
                    found[start] = Symbol(start, length, readable_name(name))
    return sorted(found.values(), key=lambda symbol: symbol.start)
