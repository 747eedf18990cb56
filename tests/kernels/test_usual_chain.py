"""Chains of the usual shape: together they are what vring.look_at_next finds one by one, and as safe."""

import random

import numpy as np
import pytest
from hypothesis import given

from kernels import status, usual_chain, vring
from kernels.region_table import ACCESS
from kernels.ring_record import CHAIN, CHAINS_MAX
from kernels.usual_chain import look_at_usual
from tests.kernels.interpreted import Fields, Interpreter, Records
from tests.kernels.ring_pair import ONE
from tests.kernels.test_ring_stores import COPIED, SEGMENTS, Death, Died
from tests.kernels.test_rings import LAYOUTS, SEEDS, examples, new_world, put
from tests.mock.random_driver import RandomPackedDriver, RandomSplitDriver
from tests.model.chain import F_WRITE

pytestmark = [pytest.mark.timeout(180), pytest.mark.filterwarnings("ignore:overflow encountered")]

FIRST_BYTES, LAST_BYTES = np.uint64(16), np.uint64(1)


class _Usual:
    """Makes chains of the usual shape, but for a share of them."""

    unusual = 0.0

    def count(self, most):
        return 3 if most >= 3 and self.rng.random() >= self.unusual else super().count(most)

    def buffers(self, count):
        if count != 3 or self.rng.random() < self.unusual:
            return super().buffers(count)
        (first, _), (data, length), (last, _) = self.buffer(), self.buffer(), self.buffer()
        data_flags = self.rng.choice((0, F_WRITE))
        return [
            (self._away_from_border(first), 16, 0),
            (self._away_from_border(data), length, data_flags),
            (last, 1, 2),
        ]

    def _away_from_border(self, address):
        """So that what begins there is in one piece."""
        return address - 0x1000 if 0x400_3800 <= address < 0x400_4000 or address >= 0x400_5800 else address


class UsualSplitDriver(_Usual, RandomSplitDriver):
    def before_table(self, count):
        return super().before_table(count) if self.rng.random() < self.unusual else 0


class UsualPackedDriver(_Usual, RandomPackedDriver):
    pass


def usual_world(rng, packed, unusual, **features):
    """new_world, with a driver of which that share is unusual."""
    features.setdefault("log", False)
    pair, driver = new_world(rng, packed, **features)
    driver.__class__ = UsualPackedDriver if packed else UsualSplitDriver
    driver.unusual = unusual
    return pair, driver


def available(ring, most):
    """As many as `look_at_usual` may be asked for."""
    count = int(vring.waiting(ring))
    return min(CHAINS_MAX // 2 if ring["packed"] and count > 0 else count, most)


def expected(ring, pair):
    """The next chain by vring.look_at_next, which takes it: (head, slots, buffer_id, segments), or None: unusual."""
    answer = vring.look_at_next(ring, pair.regions, SEGMENTS, COPIED)
    code, head, readable, count, clean = answer
    if code != status.OK:
        return None
    segments = SEGMENTS[:count].tolist()
    assert vring.take(ring, head, COPIED, 0) == status.OK
    if not clean or count != 3 or readable not in (1, 2) or segments[0][1] != 16 or segments[2][1] != 1:
        return None
    return head, int(ring["slots"]), int(ring["buffer_id"]), readable, segments


def compare(ring, pair, chains, count):
    """What was found is what there is, one by one. Returns the first that was not found (`expected`)."""
    for chain in chains[:count]:
        head, slots, buffer_id, readable, segments = expected(ring, pair)
        if ring["packed"]:
            assert (chain["slots"], chain["buffer_id"]) == (slots, buffer_id)
        else:
            assert chain["head"] == head
        assert bool(chain["data_writable"]) == (readable == 1)
        assert [chain["first"], chain["data"], chain["last"]] == [address for address, _ in segments]
        assert chain["data_bytes"] == segments[1][1]
    return None if count == len(chains) or vring.waiting(ring) <= 0 else expected(ring, pair)


@LAYOUTS
@examples(150)
@given(seed=SEEDS)
def test_all_usual_chains_are_found(packed, seed):
    rng = random.Random(seed)
    pair, driver = usual_world(rng, packed, 0.0, size=rng.choice((5, 17, 64) if packed else (4, 16, 64)))
    ring = pair.rings[0]
    for _ in range(10):
        before = driver.free
        many = put(driver, 12)
        if driver.free == 0 or before < 3:
            break  # the last one may be cut short
        pair.sync()
        chains = np.zeros(CHAINS_MAX, CHAIN)
        wanted = available(ring, CHAINS_MAX)
        count = look_at_usual(ring, pair.regions, COPIED, chains, wanted, FIRST_BYTES, LAST_BYTES)
        assert count == min(many, wanted)
        found = chains[:count].copy()
        compare(ring, pair, found, count)
        vring.publish(ring, ONE)
        while vring.waiting(ring) > 0:
            assert expected(ring, pair)
    pair.close()


@LAYOUTS
@examples(400)
@given(seed=SEEDS)
def test_what_is_found_is_what_there_is(packed, seed):
    """Whatever a driver writes, and whichever way its memory may be used."""
    rng = random.Random(seed)
    pair, driver = usual_world(rng, packed, 0.3, size=16)
    ring = pair.rings[0]
    pair.regions[pair.regions[:, 0] == 0x400_4000, ACCESS] = rng.choice((3, 3, 1, 2, 4))
    for _ in range(10):
        put(driver, rng.randrange(1, 12))
        if rng.random() < 0.7:
            driver.misbehave()
        pair.sync()
        wanted = available(ring, CHAINS_MAX)
        if wanted <= 0:
            continue
        chains = np.zeros(CHAINS_MAX, CHAIN)
        count = look_at_usual(ring, pair.regions, COPIED, chains, wanted, FIRST_BYTES, LAST_BYTES)
        compare(ring, pair, chains[:count].copy(), count)
        if vring.waiting(ring) > 0 and vring.look_at_next(ring, pair.regions, SEGMENTS, COPIED)[0] != status.OK:
            break
    pair.close()


@LAYOUTS
@examples(120)
@given(seed=SEEDS)
def test_driver_that_writes_between_any_two_loads(packed, seed):
    """Whatever is read, every buffer lies in guest memory, and what is written to is what may be written to."""
    rng = random.Random(seed)
    pair, driver = usual_world(rng, packed, 0.1, size=rng.choice((4, 8, 16)))
    read_only = pair.regions[:, 0] == 0x800_0000
    pair.regions[read_only, ACCESS] = 1
    pieces = [(pair.address(piece, 0), len(data), piece == 3) for piece, data in enumerate(pair.memory.pieces)]
    chance = rng.choice((0.02, 0.3))

    def change(address, count):
        if rng.random() < chance:
            driver.misbehave()
            pair.sync()

    code = Interpreter(on_load=change).module(usual_chain)
    array = np.zeros(CHAINS_MAX, CHAIN)
    for _ in range(5):
        put(driver, 5)
        pair.sync()
        wanted = available(pair.rings[0], CHAINS_MAX)
        if wanted <= 0:
            break
        count = code.look_at_usual(
            pair.ring_record, pair.regions, COPIED, Records(array), wanted, FIRST_BYTES, LAST_BYTES
        )
        for chain in array[:count]:
            assert 0 <= chain["head"] < pair.place.size
            buffers = [(chain["first"], 16, False), (chain["data"], chain["data_bytes"], chain["data_writable"])]
            for address, length, writable in [*buffers, (chain["last"], 1, True)]:
                assert any(
                    start <= address and int(address) + int(length) <= start + size and not (writable and fixed)
                    for start, size, fixed in pieces
                )
    pair.close()


@LAYOUTS
@examples(60)
@given(seed=SEEDS)
def test_every_descriptor_is_read_once(packed, seed):
    """But for the flags of a head descriptor, which are looked at before and tell only whether there is a table."""
    rng = random.Random(seed)
    pair, driver = usual_world(rng, packed, 0.0, size=32)
    put(driver, 6)
    pair.sync()
    loads = []
    code = Interpreter(on_load=lambda address, count: loads.append((address, count))).module(usual_chain)
    array = np.zeros(CHAINS_MAX, CHAIN)
    count = code.look_at_usual(
        pair.ring_record, pair.regions, COPIED, Records(array), available(pair.rings[0], 16), FIRST_BYTES, LAST_BYTES
    )
    assert count > 0
    ring = pair.rings[0]
    heads = {int(ring["desc"]) + 16 * int(head) for head in array[:count]["head"]}
    if packed:
        heads = {address - 8 for address, count in loads if count == 8}  # what `is_available` looks at
    again = {byte for head in heads for byte in range(head, head + 16)}
    touched = [byte for address, count in loads for byte in range(address, address + count)]
    checked = [byte for byte in touched if byte not in again]
    assert len(checked) == len(set(checked))
    assert len(touched) - len(set(touched)) <= 16 * count
    pair.close()


def serve_some(rings, usual, ring, pair, array):
    """Take some usual chains and give them back, by the functions of these modules. How many."""
    waiting = rings.waiting(ring)
    if waiting <= 0 or ring.resubmit_next < ring.resubmit_count:
        return 0  # those come first, one by one
    chains = Records(array)
    wanted = min(int(usual.group_size(ring, waiting)), 4)
    count = usual.look_at_usual(ring, pair.regions, COPIED, chains, wanted, FIRST_BYTES, LAST_BYTES)
    for k in range(count):
        assert usual.take_usual(ring, chains[k], COPIED) == status.OK
    for k in range(count):
        rings.hold(ring, chains[k])
        rings.give_back(ring, pair.table, array[k]["head"], np.uint64(5))
    rings.publish(ring, ONE)
    return count


@LAYOUTS
@examples(40)
@given(seed=SEEDS)
def test_death_after_any_store(packed, seed):
    """Several chains are taken before the first is given back: whatever store was the last, each completes once."""
    rng = random.Random(seed)
    pair, driver = usual_world(rng, packed, 0.0, size=16, inflight=True)
    put_in_all = reaped = 0
    array = np.zeros(CHAINS_MAX, CHAIN)
    for _ in range(10):
        put_in_all += put(driver, rng.randrange(1, 5))
        pair.sync()
        interpreter = Interpreter(on_store=Death(rng.randrange(150)))
        rings, usual = interpreter.module(vring), interpreter.module(usual_chain)
        try:
            while serve_some(rings, usual, pair.ring_record, pair, array):
                pass
        except Died:
            pass
        pair.adopt()
        assert pair.start(takes_over=True) == status.OK
        if rng.random() < 0.7:
            assert pair.echo(100, 1)[1] is None
            reaped += driver.reap()
    assert pair.echo(100, 1)[1] is None
    assert reaped + driver.reap() == put_in_all
    assert not driver.outstanding
    pair.close()


def test_a_record_is_what_a_kernel_sees():
    """Records and Fields write through to the array."""
    array = np.zeros(2, CHAIN)
    Records(array)[1].head = 7
    assert array[1]["head"] == 7
    assert Fields(array[1]).head == 7
