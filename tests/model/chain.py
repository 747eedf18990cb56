"""Descriptor chains (virtio 1.2: 2.7.5 split, 2.8.5 to 2.8.8 packed) as buffers of guest memory."""

import struct

from tests.model.guest_memory import READ, WRITE, Broken

F_NEXT, F_WRITE, F_INDIRECT = 1, 2, 4
ENTRY = struct.Struct("<QIHH")  # split: address, length, flags, next; packed: address, length, id, flags
INDIRECT_MAX = 1024  # what a device takes beyond its queue's size is its own choice; ours does as QEMU
SEGMENTS_MAX = 65536


class Buffers:
    """The buffers of a chain: segments, the number of them that are readable, and whether all is in guest memory."""

    def __init__(self, memory):
        self.memory = memory
        self.segments = []
        self.tables = []  # (piece, offset, bytes) of indirect tables
        self.first_writable = None
        self.clean = True

    @property
    def readable(self):
        return len(self.segments) if self.first_writable is None else self.first_writable

    def add(self, address, length, writable):
        """2.7.4.2 and 2.8.19: a writable buffer comes after every readable one."""
        if writable:
            if self.first_writable is None:
                self.first_writable = len(self.segments)
        elif self.first_writable is not None:
            raise Broken("DIRECTION")
        parts = self.memory.segments(address, length, WRITE if writable else READ)
        if len(self.segments) + len(parts) > SEGMENTS_MAX:
            raise Broken("CHAIN_TOO_LONG")
        self.segments += parts
        if not length or parts[-1].piece < 0:
            self.clean = False


def indirect_table(memory, size, allowed, address, length):
    """(piece, offset, entries) of an indirect table (2.7.5.3, 2.8.7)."""
    if not allowed or length == 0 or length % 16 or length // 16 > max(size, INDIRECT_MAX):
        raise Broken("INDIRECT_TABLE")
    place = memory.in_one_piece(address, length)
    if place is None:
        raise Broken("INDIRECT_TABLE")
    return *place, length // 16


def walk_split(memory, table, size, head, indirect):
    """The Buffers of a split ring's chain. table: (piece, offset) of the descriptor table. Raises: Broken, Missing."""
    piece, offset = table
    data, entries, left, index, in_table = memory.pieces[piece], size, size, head, False
    buffers = Buffers(memory)
    while True:
        if not left:
            raise Broken("CHAIN_TOO_LONG")
        left -= 1
        address, length, flags, following = ENTRY.unpack_from(data, offset + 16 * index)
        if flags & F_INDIRECT:
            # 2.7.5.3.1: not within a table, and nothing follows one.
            if in_table or flags & F_NEXT:
                raise Broken("INDIRECT_TABLE")
            piece, offset, entries = indirect_table(memory, size, indirect, address, length)
            buffers.tables.append((piece, offset, length))
            data, left, index, in_table = memory.pieces[piece], entries, 0, True
            continue
        buffers.add(address, length, flags & F_WRITE)
        if not flags & F_NEXT:
            return buffers
        if following >= entries:
            raise Broken("NEXT_INDEX")
        index = following


def walk_packed(memory, size, descriptors, indirect):
    """The Buffers of a packed ring's chain. descriptors: [(address, length, id, flags)]. Raises: Broken, Missing."""
    buffers = Buffers(memory)
    for k, (address, length, _, flags) in enumerate(descriptors):
        if not flags & F_INDIRECT:
            buffers.add(address, length, flags & F_WRITE)
            continue
        # 2.8.19 lets a driver make no list with a table in it; we take one at the end, as on a split ring.
        if k != len(descriptors) - 1:
            raise Broken("INDIRECT_TABLE")
        piece, offset, entries = indirect_table(memory, size, indirect, address, length)
        buffers.tables.append((piece, offset, length))
        for entry in range(entries):
            inner = ENTRY.unpack_from(memory.pieces[piece], offset + 16 * entry)
            if inner[3] & F_INDIRECT:
                raise Broken("INDIRECT_TABLE")
            buffers.add(inner[0], inner[1], inner[3] & F_WRITE)
    return buffers
