"""What holds between any two loads and stores of the kernels: read once, and nothing is lost or done twice."""

import random

import numpy as np
import pytest
from hypothesis import given

from kernels import status, vring
from tests.kernels.interpreted import Interpreter
from tests.kernels.ring_pair import ONE, RingPair
from tests.kernels.test_rings import LAYOUTS, SEEDS, examples, new_world, put
from tests.mock.random_driver import RandomPackedDriver

pytestmark = [pytest.mark.timeout(180), pytest.mark.filterwarnings("ignore:overflow encountered")]

SEGMENTS = np.zeros((1 << 17, 2), np.uint64)
COPIED = np.zeros((1 << 15, 2), np.uint64)


class Died(Exception):
    """The process ends here."""


class Death:
    """Raises Died after the store number `at`."""

    def __init__(self, at):
        self.left = at

    def __call__(self, address, count):
        if self.left == 0:
            raise Died
        self.left -= 1


def serve_one(code, ring, pair):
    """Take the next chain and give it back, by the functions of `code`. False when there is none."""
    if code.waiting(ring) <= 0:
        return False
    answer = code.look_at_next(ring, pair.regions, SEGMENTS, COPIED)
    assert answer[0] == status.OK
    assert code.take(ring, answer[1], COPIED, 0) == status.OK
    code.give_back(ring, pair.table, answer[1], np.uint64(5))
    code.publish(ring, ONE)
    return True


@LAYOUTS
@examples(25)
@given(seed=SEEDS)
def test_death_after_any_store(packed, seed):
    """Whatever store was the last one of a process, the next one completes each request exactly once, in order."""
    rng = random.Random(seed)
    pair, driver = new_world(rng, packed, size=rng.choice((2, 4, 8)), inflight=True, log=False)
    put_in_all = reaped = 0
    for _ in range(12):
        put_in_all += put(driver, rng.randrange(1, 4))
        pair.sync()
        code = Interpreter(on_store=Death(rng.randrange(60))).module(vring)
        try:
            while serve_one(code, pair.ring_record, pair):
                pass
        except Died:
            pass
        # A process that resumes may die as well. What the model has to know is in the memory both look at.
        pair.adopt()
        if rng.random() < 0.5:
            pair.die_while_resuming(Interpreter(on_store=Death(rng.randrange(30))).module(vring), Died)
        assert pair.start(takes_over=True) == status.OK
        if rng.random() < 0.5:
            assert pair.echo(rng.randrange(1, 4), 1)[1] is None
            reaped += driver.reap()
    assert pair.echo(100, 1)[1] is None
    assert reaped + driver.reap() == put_in_all
    assert not driver.outstanding
    pair.close()


def test_death_between_slot_and_wrap_counter():
    """A used chain that goes round the end, and behind it a slot that was the middle of a chain of the last turn.

    Its flags say "available" by the old wrap counter, so that a new slot with an old counter looked like a chain that
    was not used yet, and the ring went back a whole turn.
    """
    for at in range(200):
        rng = random.Random(1)
        pair = RingPair(4, packed=True, event_idx=False, indirect=False)
        driver = RandomPackedDriver(pair.memory, pair.place, rng)
        assert pair.start() == status.OK
        reaped = 0
        for count in (3, 2):
            driver.longest = count
            driver.rng = Always(rng)
            assert driver.add()
            driver.show()
            pair.sync()
            if count == 3:
                assert pair.echo(1)[1] is None
                reaped += driver.reap()
        died = False
        try:
            serve_one(Interpreter(on_store=Death(at)).module(vring), pair.ring_record, pair)
        except Died:
            died = True
        pair.adopt()
        assert pair.start(takes_over=True) == status.OK
        assert pair.echo(10)[1] is None
        assert reaped + driver.reap() == 2, f"died after store {at}"
        assert pair.model.used_idx == 1
        pair.close()
        if not died:
            assert at > 10
            return
    raise AssertionError("serving never ended")


class Always(random.Random):
    """Draws the longest chain."""

    def __init__(self, rng):
        super().__init__(rng.getrandbits(32))

    def random(self):
        return 0.99


@LAYOUTS
@examples(40)
@given(seed=SEEDS)
def test_every_descriptor_is_read_once(packed, seed):
    """A second read could see what the check of the first did not (a driver may write at any time)."""
    rng = random.Random(seed)
    pair, driver = new_world(rng, packed, size=8)
    for _ in range(10):
        if not driver.add():
            break
        driver.show()
        pair.sync()
        loads = []
        code = Interpreter(on_load=lambda address, count, to=loads: to.append((address, count))).module(vring)
        answer = code.look_at_next(pair.ring_record, pair.regions, SEGMENTS, COPIED)
        assert answer[0] == status.OK
        touched = [byte for address, count in loads for byte in range(address, address + count)]
        assert touched, "the chain was read"
        assert len(touched) == len(set(touched))
        assert pair.echo(1)[1] is None
    pair.close()


@LAYOUTS
@examples(120)
@given(seed=SEEDS)
def test_driver_that_writes_between_any_two_loads(packed, seed):
    """Whatever is read, every segment lies in guest memory and the ring stays within itself."""
    rng = random.Random(seed)
    pair, driver = new_world(rng, packed, size=rng.choice((2, 4, 8)), log=False)
    pieces = [(pair.address(piece, 0), len(data)) for piece, data in enumerate(pair.memory.pieces)]

    def change(address, count):
        if rng.random() < 0.3:
            driver.misbehave()
            pair.sync()

    code = Interpreter(on_load=change).module(vring)
    ring = pair.rings[0]
    for _ in range(8):
        put(driver, 3)
        pair.sync()
        if code.waiting(pair.ring_record) <= 0:
            continue
        answer = code.look_at_next(pair.ring_record, pair.regions, SEGMENTS, COPIED)
        if answer[0] != status.OK:
            break
        for address, length in SEGMENTS[: answer[3]].tolist():
            inside = any(start <= address and address + length <= start + size for start, size in pieces)
            assert inside or address == 0
        assert vring.take(ring, answer[1], COPIED, 0) == status.OK
        vring.give_back(ring, pair.table, answer[1], np.uint64(5))
        assert int(ring["used_idx"]) & 0x7FFF < pair.place.size or not packed
        pair.adopt()
    pair.close()


@pytest.mark.parametrize("slot", [4, 5, 0x7FFF])
def test_base_outside_of_a_packed_ring_is_refused(slot):
    pair = RingPair(4, packed=True, event_idx=False, base=slot | 0x8000)
    assert pair.start() == status.ERR_RING_BASE
    pair.close()


@LAYOUTS
@examples(300)
@given(seed=SEEDS)
def test_damaged_inflight_region(packed, seed):
    """Whatever stands in it, a ring that starts stays within its memory: either it is refused, or it can be served."""
    rng = random.Random(seed)
    pair, driver = new_world(rng, packed, size=8, inflight=True, log=False)
    put(driver, 5)
    pair.sync()
    pair.echo(2, 1, rng.randrange(8))
    region = pair.inflight_bytes
    for _ in range(rng.randrange(1, 12)):
        at = rng.randrange(len(region))
        region[at] = rng.choice((0, 1, 7, 8, 0xFF, rng.getrandbits(8)))
    heads, counters = np.zeros(8, np.int64), np.zeros(8, np.uint64)
    ring = pair.rings[0]
    code, count = vring.resume(ring, np.uint16(pair.base), heads, counters)
    assert code in (status.OK, status.ERR_INFLIGHT, status.ERR_RING_BASE)
    if code == status.OK:
        assert 0 <= count <= 8
        ring["resubmit"] = heads.ctypes.data
        for _ in range(20):
            if vring.waiting(ring) <= 0:
                break
            answer = vring.look_at_next(ring, pair.regions, SEGMENTS, COPIED)
            if answer[0] != status.OK or vring.take(ring, answer[1], COPIED, 0) != status.OK:
                break
            vring.give_back(ring, pair.table, answer[1], np.uint64(1))
        pair.check_guards()
    pair.close()


@examples(150)
@given(seed=SEEDS)
def test_inflight_region_that_changes_while_it_is_read(seed):
    """The front-end writes to it between any two loads of a packed ring that starts."""
    rng = random.Random(seed)
    pair, driver = new_world(rng, True, size=8)
    put(driver, 5)
    pair.sync()
    pair.echo(3, 1, rng.randrange(12))

    def change(address, count):
        if rng.random() < 0.5:
            pair.inflight_bytes[rng.randrange(12, 22)] = rng.choice((0, 1, 7, 8, 0xFF))

    heads, counters = np.zeros(8, np.int64), np.zeros(8, np.uint64)
    code, count = Interpreter(on_load=change).module(vring).resume(pair.ring_record, np.uint16(0), heads, counters)
    if code == status.OK:
        ring = pair.rings[0]
        assert int(ring["used_idx"]) & 0x7FFF < 8
        assert int(ring["last_avail_idx"]) & 0x7FFF < 8
        assert 0 <= count <= 8
    pair.close()
