import os
import subprocess
import sys

import pytest

from vvupipe.errors import UserError
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
