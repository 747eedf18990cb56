"""Kernels and the plain-Python model on the same ring with the same random driver: every byte equal after every step.

An operation is one chain put, served and compared, or one change or decision about notifications.
"""

import random
import struct

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kernels import status
from tests.kernels.echo_device import KILLED
from tests.kernels.ring_pair import BUFFER_LAYOUT, RingPair
from tests.mock.random_driver import RandomPackedDriver, RandomSplitDriver
from tests.model.guest_memory import Missing, Row

pytestmark = pytest.mark.timeout(180)

SPLIT_SIZES = (2, 4, 8, 16, 64, 256, 1024, 32768)
PACKED_SIZES = (1, 2, 3, 5, 8, 17, 64, 255, 1000, 32768)
LAYOUTS = pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
SEEDS = st.integers(0, (1 << 32) - 1)
#: Enough for a failure that comes once in some hundred thousand operations to be found in a few runs of CI.
MILLION_HALF = 500_000
OPERATIONS_EACH = 2_500


def examples(count):
    """Seeds do not shrink to anything simpler, so that nothing is spent on it."""
    return settings(max_examples=count, deadline=None, suppress_health_check=list(HealthCheck))


def position(rng, size, packed):
    """Where a ring starts: close to a wrap-around more often than not."""
    if packed:
        return rng.choice((0, 0x8000)) | rng.choice((0, size - 1, rng.randrange(size)))
    return rng.choice((0, 0xFFFF, 0xFFF0, (-size) & 0xFFFF, rng.getrandbits(16)))


def new_world(rng, packed, *, size=None, longest=6, **features):
    """(pair, driver) of a ring at a random place, with features drawn where they are not given."""
    size = size or rng.choice((PACKED_SIZES if packed else SPLIT_SIZES)[: -1 if rng.random() < 0.95 else None])
    base = position(rng, size, packed)
    for name in ("event_idx", "indirect", "inflight", "log"):
        features.setdefault(name, rng.random() < (0.8 if name == "indirect" else 0.4))
    pair = RingPair(size, packed=packed, base=base, **features)
    kind = RandomPackedDriver if packed else RandomSplitDriver
    driver = kind(pair.memory, pair.place, rng, base, longest)
    assert pair.start() == status.OK
    return pair, driver


def put(driver, most):
    """Put up to `most` chains and show them. How many."""
    count = 0
    while count < most and driver.add():
        count += 1
    driver.show()
    return count


class Operations:
    """Counts, and holds the random steps of a driver that keeps to the rules."""

    def __init__(self):
        self.count = 0
        self.calls = 0

    def steps(self, pair, driver, rng, wanted):
        """Single steps in random order, compared after each one, until `wanted` operations are done."""
        end = self.count + wanted
        while self.count < end:
            action = rng.randrange(6)
            if action == 0:
                put(driver, rng.randrange(1, 5))
                pair.sync()
            elif action == 1:
                self.count += self.serve(pair, rng.randrange(1, 6), rng.randrange(1, 4))
            elif action == 2:
                driver.change_wish()
                pair.sync()
                self.count += 1
            elif action == 3:
                pair.want_kicks()
                self.count += 1
            elif action == 4:
                pair.refuse_kicks()
                self.count += 1
            else:
                driver.reap()

    def serve(self, pair, limit, group):
        """Serve chains of a driver that did nothing wrong. How many."""
        served, outcome = pair.echo(limit, group)
        assert outcome is None
        self.calls += pair.called()
        return served

    def batches(self, pair, driver, rng, wanted):
        """As many chains as there is room for, then everything the device does with them, then the comparison."""
        end = self.count + wanted
        while self.count < end:
            driver.change_wish()
            pair.sync()
            if rng.random() < 0.5:
                pair.want_kicks()
            else:
                pair.refuse_kicks()
            put(driver, 400)
            pair.sync()
            self.count += 2 + self.serve(pair, 32768, rng.choice((1, 2, 8, 64)))
            driver.reap()


@pytest.mark.timeout(400)
@LAYOUTS
def test_half_a_million_operations(packed, capsys):
    """Twice this is what a run of CI does at least; most go by in batches, a share of them in single steps."""
    operations = Operations()

    @examples(MILLION_HALF // OPERATIONS_EACH)
    @given(seed=SEEDS, single=st.integers(0, 9))
    def run(seed, single):
        rng = random.Random(seed)
        pair, driver = new_world(rng, packed)
        if single == 0:
            operations.steps(pair, driver, rng, OPERATIONS_EACH)
        else:
            operations.batches(pair, driver, rng, OPERATIONS_EACH)
        pair.close()

    run()
    with capsys.disabled():
        name = "packed" if packed else "split"
        print(f"\n{operations.count} operations on {name} rings, {operations.calls} calls, no difference to the model")
    assert operations.count >= MILLION_HALF
    assert operations.calls > 0


@LAYOUTS
@examples(60)
@given(seed=SEEDS)
def test_each_step_of_a_driver_that_keeps_the_rules(packed, seed):
    rng = random.Random(seed)
    pair, driver = new_world(rng, packed)
    Operations().steps(pair, driver, rng, 300)
    pair.close()


@LAYOUTS
@pytest.mark.parametrize("size", [1, 2, 32768])
def test_smallest_and_largest_queue(packed, size):
    """Indices go round more than once."""
    if size == 1 and not packed:
        size = 4
    rng = random.Random(size)
    pair, driver = new_world(rng, packed, size=size, indirect=False, longest=1 if size < 32768 else 200)
    Operations().batches(pair, driver, rng, 70_000 if size == 2 and not packed else 3_000)
    pair.close()


@LAYOUTS
@examples(600)
@given(seed=SEEDS)
def test_driver_that_breaks_every_rule(packed, seed):
    """Which input breaks the ring and which is the request's own fault: both sides say the same, and then stop."""
    rng = random.Random(seed)
    pair, driver = new_world(rng, packed, size=rng.choice((1, 2, 3, 5, 16) if packed else (2, 4, 8, 16)))
    for _ in range(40):
        put(driver, rng.randrange(1, 6))
        driver.change_wish()
        if rng.random() < 0.7:
            driver.misbehave()
        pair.sync()
        _, outcome = pair.echo(rng.randrange(1, 40), rng.randrange(1, 4))
        if outcome is not None:
            break
        if rng.random() < 0.3:
            pair.want_kicks()
        # What is used comes back without a look: the driver forgot long ago what it put where.
        driver.free = max(driver.free, 0)
    pair.close()


def rows_of(rng):
    """An IOTLB: pages and parts of pages, some one way only, some refused, with holes."""
    rows = []
    for piece, (start, size) in enumerate(BUFFER_LAYOUT[:3], 1):
        at = 0
        while at < size:
            length = min(rng.choice((0x1000, 0x1000, 0x200, 0x2000)), size - at)
            kind = rng.random()
            access = 3 if kind < 0.8 else 1 if kind < 0.87 else 2 if kind < 0.94 else 4
            if rng.random() > 0.06:
                to = at if rng.random() < 0.7 else rng.randrange(size - length + 1)
                rows.append(Row(start + at, length, piece, to, access))
            at += length
    return rows


@LAYOUTS
@examples(150)
@given(seed=SEEDS)
def test_translations_that_are_lacking(packed, seed):
    """A miss takes nothing; when the translation has come, the same chain is served."""
    rng = random.Random(seed)
    pair, driver = new_world(rng, packed, size=16, rows=rows_of(rng))
    for _ in range(60):
        put(driver, 4)
        pair.sync()
        _, outcome = pair.echo(rng.randrange(1, 8), rng.randrange(1, 4))
        if isinstance(outcome, Missing):
            answer(pair, rng, *outcome.args)
        elif outcome is not None:
            break
        else:
            driver.reap()
    pair.close()


def answer(pair, rng, address, access):
    """Add what is missing: the page that the address is in, or a refusal of it."""
    start = address & ~0xFFF
    rows = [row for row in pair.memory.rows if row.start + row.size <= start or row.start >= start + 0x1000]
    for row in pair.memory.rows:
        # What stays of translations that the new one overlaps.
        if row.start < start < row.start + row.size:
            rows.append(row._replace(size=start - row.start))
        if row.start < start + 0x1000 < row.start + row.size:
            cut = start + 0x1000 - row.start
            offset = row.offset if row.access & 4 else row.offset + cut
            rows.append(Row(start + 0x1000, row.size - cut, row.piece, offset, row.access))
    piece = rng.randrange(1, 4)
    offset = 0x1000 * rng.randrange(len(pair.memory.pieces[piece]) >> 12)
    rows.append(Row(start, 0x1000, piece, offset, 4 if rng.random() < 0.1 else 3 if access else 0))
    pair.memory.set_rows(rows)
    pair.tables()


@LAYOUTS
@examples(250)
@given(seed=SEEDS)
def test_what_changes_after_the_look_changes_nothing(packed, seed):
    """Descriptors, tables and the available ring are written over between look and use."""
    rng = random.Random(seed)
    pair, driver = new_world(rng, packed, size=16)
    for _ in range(10):
        if not put(driver, 1):
            break
        pair.sync()
        overwrite = struct.pack("<QIHH", rng.getrandbits(64), rng.getrandbits(32), *(rng.getrandbits(16),) * 2)
        pair.echo_with_change(overwrite)
        driver.show()
    pair.close()


@LAYOUTS
@examples(400)
@given(seed=SEEDS)
def test_killed_anywhere_and_resumed(packed, seed):
    """Every request completes exactly once and in order, whichever point between two steps a device died at.

    `driver.reap` asserts that.
    """
    rng = random.Random(seed)
    pair, driver = new_world(rng, packed, size=rng.choice((2, 4, 8, 16)), inflight=rng.random() < 0.7)
    put_in_all = reaped = 0
    for _ in range(25):
        put_in_all += put(driver, rng.randrange(1, 6))
        pair.sync()
        if rng.random() < 0.7:
            outcome = pair.echo(8, rng.randrange(1, 4), rng.randrange(20))[1]
        else:
            outcome = pair.echo(rng.randrange(1, 4), rng.randrange(1, 4))[1]
        assert outcome in (None, KILLED)
        if rng.random() < 0.3:
            reaped += driver.reap()
        if outcome == KILLED or rng.random() < 0.2:
            assert pair.start(takes_over=True) == status.OK
    assert pair.echo(100, 1)[1] is None
    assert reaped + driver.reap() == put_in_all
    assert not driver.outstanding
    pair.close()


@examples(150)
@given(seed=SEEDS)
def test_batch_of_another_back_end(seed):
    """One that uses chains in any order and several at once (ours never does) died before it noted that in the region.

    What it used is not done again, the rest is.
    """
    rng = random.Random(seed)
    pair, driver = new_world(rng, False, size=16, inflight=True, log=False)
    start = driver.used_idx
    put_in_all = put(driver, 8)
    model, place = pair.model, pair.place
    taken = []
    for _ in range(rng.randrange(1, put_in_all + 1)):
        taken.append(model.look())
        model.take(taken[-1])
    batch = rng.sample(taken, rng.randrange(len(taken) + 1))
    for k, chain in enumerate(batch):
        # Steps 1 to 5 of "When supplying used buffers", without 6 and 7.
        struct.pack_into("<H", pair.model_inflight, 16 + 16 * chain.head + 6, *pair.model_inflight_word(12))
        struct.pack_into("<H", pair.model_inflight, 12, chain.head)
        pair.memory.pack("<II", 0, place.used + 4 + 8 * ((start + k) % place.size), chain.head, 0)
    pair.memory.pack("<H", 0, place.used + 2, (start + len(batch)) & 0xFFFF)
    pair.take_over_region()
    assert pair.start(takes_over=True) == status.OK
    assert len(pair.model.again) == len(taken) - len(batch)
    assert pair.echo(100, 2)[1] is None
    used = [pair.memory.unpack("<I", 0, place.used + 4 + 8 * ((start + k) % 16))[0] for k in range(put_in_all)]
    assert sorted(used) == sorted(head for head, _ in driver.outstanding)
    pair.close()
