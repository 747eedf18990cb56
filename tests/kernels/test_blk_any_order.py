"""Requests that io_uring and helper threads complete in any order, against a block device in plain Python."""

import collections
import random

import numpy as np
import pytest
from hypothesis import given

from kernels import control_block as cb
from kernels import status
from kernels.inflight_packed import list_inflight as list_packed
from kernels.inflight_split import list_inflight as list_split
from tests.kernels.disk_pair import DiskPair
from tests.kernels.others import by_hand, needs_io_uring, shared
from tests.kernels.ring_pair import RingPair
from tests.kernels.test_rings import LAYOUTS, SEEDS, examples, position
from tests.mock.random_blk_driver import PackedApartDriver, SplitApartDriver

pytestmark = pytest.mark.timeout(180)

SECTORS = 512
KINDS = pytest.mark.parametrize(
    "kind",
    [
        pytest.param("uring", marks=needs_io_uring),
        pytest.param("polled", marks=needs_io_uring),
        "helpers",
    ],
)


class AnyOrder:
    """A ring, its driver and a disk of which both sides serve batches of requests that do not touch each other."""

    def __init__(self, rng, packed, kind, *, size=None, **disk):
        size = size or rng.choice((2, 3, 8, 31, 64) if packed else (2, 4, 8, 32, 128))
        base = position(rng, size, packed)
        features = {name: rng.random() < 0.4 for name in ("event_idx", "log")}
        # Without a region a successor could not tell what was under way: a worker always has one.
        self.pair = RingPair(size, packed=packed, base=base, inflight=True, **features)
        kind_of_driver = PackedApartDriver if packed else SplitApartDriver
        self.driver = kind_of_driver(self.pair.memory, self.pair.place, rng, base, longest=6)
        self.driver.sectors = SECTORS
        self.rng, self.packed = rng, packed
        assert self.pair.start() == status.OK
        self.by_hand = kind == "by hand"
        others = by_hand(3) if self.by_hand else shared(kind)
        self.disk = DiskPair(SECTORS, rng, others=others, **disk)

    def serve(self, most):
        """Serve a batch on both sides and compare. Returns how many requests it had."""
        pair, disk = self.pair, self.disk
        put = self.driver.put_batch(most)
        pair.sync()
        before = pair.kernel_piece(0).copy()
        done = self._serve_by_hand() if self.by_hand else disk.serve_kernel(pair)
        disk.drain(pair)
        served, rule = disk.serve_model(pair)
        assert rule is None
        assert pair.rings[0]["state"] == cb.VRING_RUNNING, int(pair.rings[0]["error"])
        assert done == served == put
        expected_used = self._used()
        for piece in range(1, len(pair.memory.pieces)):
            assert bytes(pair.kernel_piece(piece)) == bytes(pair.memory.pieces[piece]), f"piece {piece}"
        assert disk.image() == disk.model.image, "image"
        self._check_ring(before)
        pair.adopt()
        found = self.driver.reap_all()
        assert sorted(found) == expected_used, "used elements"
        return put

    def _serve_by_hand(self):
        """Helpers get done in a random order, and slowly: many requests wait for one."""
        done = 0
        while True:
            some = self.disk.serve_turn(self.pair)
            given = self.disk.others.given()
            if given and (not some or self.rng.random() < 0.5):
                self.disk.others.do(self.rng.choice(given))
            self.disk.end_some(self.pair)
            done += some
            if not some and not self.disk.others.boards["under_way"][0]:
                return done

    def _used(self):
        """What the model used, sorted; the driver's own view of it stays as it was."""
        driver = self.driver
        state = (driver.free, list(driver.outstanding), driver.rng.getstate())
        names = ("used_slot", "used_wrap", "ids") if self.packed else ("used_idx", "descriptors")
        kept = {name: getattr(driver, name) for name in names}
        for name, value in kept.items():
            setattr(driver, name, list(value) if isinstance(value, list) else value)
        found = sorted(driver.reap_all())
        driver.free, driver.outstanding = state[0], state[1]
        driver.rng.setstate(state[2])
        for name, value in kept.items():
            setattr(driver, name, value)
        return found

    def _check_ring(self, before):
        """Both sides stand at the same place, nothing of the ring is under way, and the counters say the same."""
        pair, ring, model = self.pair, self.pair.rings[0], self.disk.model
        assert (ring["last_avail_idx"], ring["used_idx"]) == (pair.model.last_avail_idx, pair.model.used_idx)
        assert ring["under_way"] == ring["unpublished"] == 0
        assert ring["requests"] == sum(model.statuses.values())
        assert ring["errors"] == ring["requests"] - model.statuses[0]
        if pair.memory.log is not None:
            assert pair._log[: len(pair.memory.log)].tobytes() == pair.memory.log, "dirty log"
        heads, counters = np.zeros(ring["size"], np.int64), np.zeros(ring["size"], np.uint64)
        if self.packed:
            assert list_packed(ring, heads, counters) == (0, 0)
        else:
            place = pair.place
            assert list_split(ring, heads, counters) == 0
            assert bytes(pair.kernel_piece(0)[: place.used]) == before[: place.used].tobytes(), "the driver's areas"
        self.disk.others.check_idle()

    def close(self):
        self.disk.drain(self.pair)
        self.disk.close()
        self.pair.close()


@pytest.mark.parametrize("kind", [*KINDS.args[1], "by hand"])
@LAYOUTS
def test_requests_of_every_kind(packed, kind):
    statuses = collections.Counter()
    merges = redone = 0

    @examples(60)
    @given(seed=SEEDS)
    def run(seed):
        nonlocal merges, redone
        rng = random.Random(seed)
        world = AnyOrder(
            rng,
            packed,
            kind,
            mapped=rng.random() < 0.3,
            read_only=rng.random() < 0.1,
            bounces=rng.random() < 0.2,
            abilities=rng.random() < 0.9,
        )
        world.disk.disks["merge_bytes"] = rng.choice((0, 4096, 256 << 10))
        world.disk.disks["nowait"] = rng.random() < 0.3
        world.disk.begin()
        done = 0
        while done < 100:
            world.driver.change_wish()
            done += world.serve(rng.randrange(1, 30))
        statuses.update(world.disk.model.statuses)
        merges += int(world.disk.others.boards["merges"][0])
        redone += int(world.disk.others.boards["redone"][0])
        world.close()

    run()
    assert statuses.total() >= 60 * 100
    assert statuses[0] > statuses.total() // 2, "most requests are good ones"
    assert statuses[1] > 0
    assert statuses[2] > 0
    assert merges > 20
    assert redone == 0, "io_uring did all that it was given"
