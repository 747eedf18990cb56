import os
import subprocess
import sys

import pytest

from tests.huge_pages_kit import KINDS, PAGE, machine_with, mapped
from vvupipe.errors import UserError
from vvupipe.memory import huge_pages
from vvupipe.vm.guest_ram import SLOT_BYTES, GuestRam, RamSlot


@pytest.fixture
def ram():
    ram = GuestRam("test", 4 * SLOT_BYTES)
    yield ram
    ram.close()
    ram.close()
    assert not os.path.exists(f"/dev/shm{ram.name}")


def test_slots_are_apart_and_low_memory_is_nobody_s(ram):
    slots = [RamSlot.take(ram.name) for _ in range(3)]
    assert [slot.gpa for slot in slots] == [SLOT_BYTES, 2 * SLOT_BYTES, 3 * SLOT_BYTES]
    slots[1].view[:5] = b"hello"
    assert os.pread(ram._fd, 5, 2 * SLOT_BYTES) == b"hello"
    with pytest.raises(UserError, match="every program slot"):
        RamSlot.take(ram.name)
    slots[1].close()
    slots[1].close()
    again = RamSlot.take(ram.name)
    assert again.gpa == 2 * SLOT_BYTES
    for slot in (slots[0], again, slots[2]):
        slot.close()


def test_slot_of_a_killed_program_is_free_again(ram):
    code = (
        f"from vvupipe.vm.guest_ram import RamSlot; s = RamSlot.take({ram.name!r}); print(s.gpa, flush=True); input()"
    )
    child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert int(child.stdout.readline()) == SLOT_BYTES
    second = RamSlot.take(ram.name)
    assert second.gpa == 2 * SLOT_BYTES
    child.kill()
    child.communicate(timeout=10)
    third = RamSlot.take(ram.name)
    assert third.gpa == SLOT_BYTES
    second.close()
    third.close()


def test_ram_that_is_gone():
    with pytest.raises(UserError, match="is gone"):
        RamSlot.take("/vvupipe-no-such-ram")


def test_ram_left_by_a_killed_process_with_our_number(ram):
    again = GuestRam("test", 4 * SLOT_BYTES)
    assert again.name == ram.name
    again.close()


@pytest.mark.parametrize("kind", KINDS)
def test_slots_of_huge_pages(kind):
    with machine_with(kind, 3):
        ram = GuestRam(f"test-{os.getpid()}", 3 * PAGE, huge_pages.choose(3 * PAGE))
        word = f"vvupipe-{os.getuid()}-test-{os.getpid()}-"
        slots = [RamSlot.take(ram.name) for _ in range(5)]
        assert [slot.gpa for slot in slots] == [k * SLOT_BYTES for k in range(1, 6)]
        for number, slot in enumerate(slots):
            slot.view[:] = bytes([number]) * SLOT_BYTES
        assert [bytes(slot.view[-1:]) for slot in slots] == [bytes([number]) for number in range(5)]
        assert os.pread(ram._fd, SLOT_BYTES, 2 * SLOT_BYTES) == b"\1" * SLOT_BYTES
        touched, huge = mapped("self", kind, word)
        assert touched == huge >= 3 * PAGE
        with pytest.raises(UserError, match="every program slot"):
            RamSlot.take(ram.name)
        slots[2].close()
        again = RamSlot.take(ram.name)
        assert again.gpa == slots[3].gpa - SLOT_BYTES
        for slot in (*slots, again):
            slot.close()
        name = ram.name
        ram.close()
        ram.close()
        with pytest.raises(UserError, match="is gone"):
            RamSlot.take(name)
