"""serve_ring on a small disk against a block device in plain Python: every byte of guest memory and of the image."""

import collections
import random
import threading

import numpy as np
import pytest
from hypothesis import example, given
from numba import uint16, uint64

from kernels import control_block as cb
from kernels import status
from kernels.jit import kernel
from kernels.memory import load_u16, store_u16, store_u64
from tests.kernels.disk_pair import DiskPair
from tests.kernels.ring_pair import RingPair
from tests.kernels.test_rings import LAYOUTS, SEEDS, examples, position, put
from tests.mock.random_blk_driver import PackedBlkDriver, SplitBlkDriver

pytestmark = pytest.mark.timeout(180)

SECTORS = 256


def new_disk_world(rng, packed, *, size=None, **features):
    """(pair, driver, disk) with everything drawn that is not given."""
    size = size or rng.choice((2, 3, 8, 31, 64) if packed else (2, 4, 8, 32, 128))
    base = position(rng, size, packed)
    for name in ("event_idx", "inflight", "log"):
        features.setdefault(name, rng.random() < 0.4)
    pair = RingPair(size, packed=packed, base=base, **features)
    driver = (PackedBlkDriver if packed else SplitBlkDriver)(pair.memory, pair.place, rng, base, longest=6)
    driver.sectors = SECTORS
    assert pair.start() == status.OK
    pair.rings[0]["in_order"] = 1  # as the model completes them; tests of any order are in test_blk_any_order
    disk = DiskPair(
        SECTORS,
        rng,
        mapped=rng.random() < 0.5,
        read_only=rng.random() < 0.1,
        bounces=rng.random() < 0.2,
        abilities=rng.random() < 0.9,
    )
    return pair, driver, disk


def serve_both(pair, disk):
    """Serve until nothing is left; compare. Returns (requests, the rule that was broken or None).

    Returns None, and compares only what lies around guest memory, where requests write what others of them read.
    """
    pair.sync()
    before = int(pair.rings[0]["calls"])
    done = disk.serve_kernel(pair)
    expected, rule = disk.serve_model(pair)
    if disk.model.footprint.depends_on_order():
        pair.check_guards()
        return None
    ring = pair.rings[0]
    if rule is None:
        assert ring["state"] == cb.VRING_RUNNING, int(ring["error"])
        assert done == expected
    else:
        assert ring["state"] == cb.VRING_BROKEN
        assert ring["error"] == getattr(status, f"ERR_{rule}")
        assert done == expected + 1
    # When something is shown to the driver, and so how often it may have to be called, is the kernel's choice.
    assert int(ring["calls"]) - before <= done
    pair.model.calls = int(ring["calls"])
    pair.compare(one_by_one=False)
    assert disk.image() == disk.model.image, "image"
    return expected, rule


@LAYOUTS
def test_requests_of_every_kind(packed):
    statuses = collections.Counter()

    @examples(120)
    @given(seed=SEEDS)
    def run(seed):
        rng = random.Random(seed)
        pair, driver, disk = new_disk_world(rng, packed)
        done = 0
        while done < 150:
            driver.change_wish()
            put(driver, rng.randrange(1, 30))
            served, rule = serve_both(pair, disk)  # a driver that keeps to the rules has no byte in two requests
            assert rule is None
            assert served == driver.reap()
            done += served
        assert sum(disk.model.statuses.values()) == done == int(pair.rings[0]["requests"])
        assert int(pair.rings[0]["errors"]) == done - disk.model.statuses[0]
        statuses.update(disk.model.statuses)
        disk.close()
        pair.close()

    run()
    assert statuses.total() >= 120 * 150
    assert statuses[0] > statuses.total() // 2, "most requests are good ones"
    assert statuses[1] > 0
    assert statuses[2] > 0


@LAYOUTS
def test_requests_that_break_rules(packed):
    """A ring that is broken stays so; a request at fault gets its status, and the image keeps what it must."""
    compared = []

    @examples(400)
    @given(seed=SEEDS)
    @example(seed=247472)  # split: a request writes the used ring to the disk
    def run(seed):
        rng = random.Random(seed)
        pair, driver, disk = new_disk_world(rng, packed, size=rng.choice((2, 4, 16)))
        for _ in range(12):
            put(driver, rng.randrange(1, 6))
            if rng.random() < 0.6:
                driver.misbehave()
            outcome = serve_both(pair, disk)
            compared.append(outcome is not None)
            if outcome is None or outcome[1]:
                break
        disk.close()
        pair.close()

    run()
    assert sum(compared) > 0.97 * len(compared) > 0.97 * 400


@kernel
def disturb(
    rounds, seed, ring_address, entries, table_address, table_entries, avail_address, used_address, size, packed
):
    """Write random descriptors, heads and indices as fast as possible."""
    state = uint64(seed) | uint64(1)
    for _ in range(rounds):
        state ^= state << uint64(13)
        state ^= state >> uint64(7)
        state ^= state << uint64(17)
        pick = state >> uint64(24)
        in_table = state & uint64(7) == uint64(0)
        slot = pick % uint64(table_entries if in_table else entries)
        entry = (table_address if in_table else ring_address) + slot * uint64(16)
        what = (state >> uint64(3)) & uint64(255)
        role = slot & uint64(3)
        if what < uint64(120):
            # What a driver would write: every fourth descriptor has a header, the next one room for data, or for data
            # and status, and the one behind it room for a status.
            header = role == uint64(0)
            more = role == uint64(1) and pick & uint64(0x60000)
            flags = uint64(1) if header else uint64(3) if more else uint64(2)
            if packed:
                flags |= uint64(0x80) if pick & uint64(0x10000) else uint64(0x8000)
            start = uint64(0x8000000) if header else uint64(0x4000000)
            length = uint64(16) if header else uint64(1)
            if role == uint64(1):
                length = uint64(512) if more else (pick & uint64(1)) * uint64(512) + uint64(1)
            store_u64(entry, start + (pick % uint64(0x380)) * uint64(16))
            place = flags << uint64(48) if packed else flags << uint64(32) | (slot + uint64(1)) << uint64(48)
            store_u64(entry + uint64(8), length | place)
        elif what < uint64(250) and not packed:
            store_u16(avail_address + uint64(4) + uint64(2) * (pick % uint64(size)), uint16(slot & ~uint64(3)))
            store_u16(avail_address + uint64(2), uint16(load_u16(used_address + uint64(2)) + (pick & uint64(3))))
        elif what < uint64(252):
            store_u64(entry, state)
        elif what < uint64(254):
            store_u64(entry + uint64(8), state)
        elif what == uint64(254):
            store_u64(entry, uint64(0x8004000) + (pick & uint64(0xFF)) * uint64(16))
            flags = uint64(4) << uint64(48 if packed else 32)
            store_u64(entry + uint64(8), (pick & uint64(7)) * uint64(16) | flags)


@LAYOUTS
@pytest.mark.parametrize("seed", range(3))
def test_driver_that_writes_while_its_ring_is_served(packed, seed):
    """Safety alone: nothing is written but into what a device may write to, and the ring can be started again."""
    rng = random.Random(seed)
    pair, _, disk = new_disk_world(rng, packed, size=16, log=False)
    # The third piece is for reading only, whatever a descriptor says. It is full of headers and tables.
    pair.regions[pair.regions[:, 0] == 0x800_0000, 4] = 1
    pair.regions[pair.regions[:, 0] == 0x10_0000, 4] = 1
    kinds = np.array([0, 1, 4, 8, 11, 13, 0, 0], np.uint32)
    headers = np.zeros((0x8000 // 16, 4), np.uint32)
    headers[:, 0] = kinds[np.arange(len(headers)) % len(kinds)]
    headers[:, 2] = np.arange(len(headers)) % SECTORS
    pair.memory.pieces[3][:] = headers.tobytes()
    pair.sync()
    image_bytes = len(disk.model.image)
    arguments = (
        pair.address(0, pair.place.desc),
        pair.place.size,
        pair.address(3, 0x4000),
        256,
        pair.address(0, pair.place.avail),
        pair.address(0, pair.place.used),
    )
    arguments = (*(np.uint64(number) if number > 1 << 20 else number for number in arguments), pair.place.size, packed)
    disturb(1, 1, *arguments)
    stop = threading.Event()

    def run():
        number = seed
        while not stop.is_set():
            number += 1
            disturb(20_000, 2 * number + 1, *arguments)

    thread = threading.Thread(target=run)
    thread.start()
    broken = served = 0
    try:
        while broken < 300 or served < 300:
            ring = pair.rings[0]
            disk.serve_kernel(pair)
            served = int(ring["requests"])
            if ring["state"] == cb.VRING_BROKEN:
                assert int(ring["error"]) in status.TEXT
                broken += 1
            ring["state"] = cb.VRING_RUNNING
            ring["last_avail_idx"] = ring["used_idx"]
    finally:
        stop.set()
        thread.join()
    pair.check_guards()
    assert bytes(pair.kernel_piece(3)[:0x4000]) == headers.tobytes()[:0x4000], "wrote to what is for reading only"
    assert len(disk.image()) == image_bytes, "the image changed its size"
    disk.close()
    pair.close()
    # Afterwards a driver that keeps to the rules is served by the same process as ever.
    pair, driver, disk = new_disk_world(rng, packed)
    put(driver, 10)
    assert serve_both(pair, disk)[0] == driver.reap() > 0
    disk.close()
    pair.close()
