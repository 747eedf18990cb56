"""The embedded sibling with an inflight region, on back-ends that complete requests in any order and then die."""

import json
import random

import pytest

from tests.mock import frontend as wire
from tests.mock.blk_backend import ALL_FEATURES, WITH_INFLIGHT, BlkBackend
from tests.mock.blk_device import IN, OUT
from tests.vvupipe.vm.sibling_kit import run

pytestmark = pytest.mark.timeout(120)
SIZE = 1 << 20
BLOCKS = SIZE // 4096


@pytest.fixture
def path(tmp_path):
    return tmp_path / "s"


class Deaths:
    """A back-end that dies now and then with requests under way. `left`, `found`: heads, as it left and found them."""

    def __init__(self, path, choose, *, times, features=ALL_FEATURES, protocol=WITH_INFLIGHT):
        self.backend = BlkBackend(path, features=features, protocol=protocol)
        self.backend.prepare, self.backend.after = self._prepare, self._after
        self._choose, self.times = choose, times
        self.devices, self.left, self.found, self.used = [], [], [], []
        self.on_death = lambda: None

    def _prepare(self, device):
        if self.devices:
            self.found.append(list(device.taken))
        self.devices.append(device)
        device.choose = self._choose_now

    def _choose_now(self, taken):
        to_die = len(self.left) < self.times
        self._dies = to_die and len(taken) > 3 and len(self.devices[-1].log) > 5
        if to_die and len(taken) <= 3 and 0 < len(self.done(OUT)) < BLOCKS // 2:
            return []  # more of them are on their way, however slow the machine is
        return self._choose(taken) if self._dies else list(taken)

    def _after(self, served):
        if not self._dies:
            return None
        device = self.devices[-1]
        self.left.append(list(device.taken))
        self.used.append(device.used_idx)
        assert device.inflight is None or device.inflight.inflight() == device.taken
        self.on_death()
        return "leave"

    def done(self, kind):
        """Sectors of every request of a kind that was completed, sorted."""
        return sorted(sector for device in self.devices for done, sector, _ in device.log if done == kind)

    def count(self, request):
        return self.backend.requests.count(request)


def verify(path, capsys, deaths):
    """What the sibling says to its user, in lines, during a verify of the whole disk, which goes well."""
    with deaths.backend:
        status = run(path, json=True, workload="verify", iodepth=16)
    said = capsys.readouterr()
    found = json.loads(said.out)
    work = found["workload"]
    assert (status, work["mismatches"], work["errors"], work["verified_blocks"]) == (0, 0, 0, BLOCKS)
    assert found["reconnects"] == len(deaths.left) == deaths.times
    assert deaths.count(wire.GET_FEATURES) == deaths.backend.connections
    return said.err.splitlines()


ORDERS = {
    "the last alone": lambda taken: taken[-1:],
    "none": lambda taken: [],
    "all but the first, backwards": lambda taken: taken[:0:-1],
    "some": lambda taken: random.Random(len(taken)).sample(taken, len(taken) // 2),
}


@pytest.mark.parametrize("features", [ALL_FEATURES, ALL_FEATURES & ~wire.F_INDIRECT & ~wire.F_EVENT_IDX])
@pytest.mark.parametrize("order", ORDERS)
def test_what_a_dead_back_end_left_is_done_by_the_next_and_nothing_twice(path, capsys, order, features):
    deaths = Deaths(path, ORDERS[order], times=5, features=features)
    verify(path, capsys, deaths)
    assert deaths.found == deaths.left, "what was under way, in the order of the driver"
    assert all(deaths.left)
    every_block = [block * 8 for block in range(BLOCKS)]
    assert deaths.done(OUT) == every_block, "each was written once"
    assert [sector for sector in every_block if sector not in deaths.done(IN)] == []
    assert deaths.count(wire.GET_INFLIGHT_FD) == 1
    assert deaths.count(wire.SET_INFLIGHT_FD) == deaths.backend.connections == 6
    assert deaths.backend.bases == [(0, 0), *((0, used) for used in deaths.used)]


def test_the_region_is_given_before_the_vrings_start(path, capsys):
    deaths = Deaths(path, ORDERS["some"], times=1)
    verify(path, capsys, deaths)
    for kind in (wire.SET_VRING_NUM, wire.SET_VRING_KICK, wire.SET_VRING_ENABLE):
        places = [k for k, request in enumerate(deaths.backend.requests) if request == kind]
        regions = [k for k, request in enumerate(deaths.backend.requests) if request == wire.SET_INFLIGHT_FD]
        assert all(region < place for region, place in zip(regions, places, strict=True))


def test_a_back_end_without_the_feature_is_not_asked(path, capsys):
    deaths = Deaths(path, ORDERS["the last alone"], times=3, protocol=WITH_INFLIGHT & ~wire.INFLIGHT_SHMFD)
    verify(path, capsys, deaths)
    assert not deaths.count(wire.GET_INFLIGHT_FD) + deaths.count(wire.SET_INFLIGHT_FD)
    assert deaths.backend.bases == [(0, 0)] * 4, "the vrings began anew"


def test_an_offer_that_comes_and_goes(path, capsys):
    deaths = Deaths(path, ORDERS["the last alone"], times=4)

    def on_death():
        deaths.backend.protocol ^= wire.INFLIGHT_SHMFD

    deaths.on_death = on_death
    lines = verify(path, capsys, deaths)
    assert deaths.backend.bases == [(0, 0)] * 5
    assert deaths.count(wire.GET_INFLIGHT_FD) == 3, "a new region each time that it is offered again"
    assert lines.count("the back-end does not track inflight requests any more: the vrings begin anew") == 2


def test_features_of_the_ring_that_change(path, capsys):
    deaths = Deaths(path, ORDERS["the last alone"], times=2, features=ALL_FEATURES & ~wire.F_EVENT_IDX)

    def on_death():
        deaths.backend.features = ALL_FEATURES

    deaths.on_death = on_death
    lines = verify(path, capsys, deaths)
    assert deaths.backend.bases == [(0, 0), (0, 0), (0, deaths.used[1])]
    said = "the back-end offers other features of rings than the one before: the vrings begin anew"
    assert lines.count(said) == 1


def test_a_region_that_is_refused_by_the_next(path, capsys):
    """Because it needs a larger one, say."""
    deaths = Deaths(path, ORDERS["the last alone"], times=1)
    backend = deaths.backend
    handle = backend._handle

    def handle_once(request, body, fds):
        if request == wire.GET_INFLIGHT_FD:
            backend.refused.discard(wire.SET_INFLIGHT_FD)
        return handle(request, body, fds)

    backend._handle = handle_once
    deaths.on_death = lambda: backend.refused.add(wire.SET_INFLIGHT_FD)
    lines = verify(path, capsys, deaths)
    assert backend.bases == [(0, 0), (0, 0)]
    assert deaths.count(wire.GET_INFLIGHT_FD) == 2
    assert lines.count("the back-end refused the inflight region of the one before: the vrings begin anew") == 1


def test_a_region_that_is_refused_by_a_hang_up(path, capsys):
    """A back-end without REPLY_ACK has no other way; it must not be asked the same for ever."""
    deaths = Deaths(path, ORDERS["the last alone"], times=1, protocol=WITH_INFLIGHT & ~wire.REPLY_ACK)
    backend = deaths.backend
    message = backend._message
    given = []

    def hang_up(connection):
        alive = message(connection)
        if alive and backend.requests[-1] == wire.SET_INFLIGHT_FD:
            given.append(backend.requests[-2] == wire.GET_INFLIGHT_FD)
            return given[-1]
        return alive

    backend._message = hang_up
    lines = verify(path, capsys, deaths)
    assert given == [True, False, True]
    assert lines.count("the back-end left while it was given vrings that go on: the vrings begin anew") == 1


@pytest.mark.parametrize("refused", ["GET", "SET"])
def test_a_back_end_that_offers_it_and_gives_none(path, capsys, refused):
    deaths = Deaths(path, ORDERS["the last alone"], times=2)
    if refused == "SET":
        deaths.backend.refused = {wire.SET_INFLIGHT_FD}
        reason = "the back-end refused SET_INFLIGHT_FD (code 0x1)"
    else:
        deaths.backend.answers[wire.GET_INFLIGHT_FD] = bytes(24)
        reason = "the back-end gave no inflight region"
    lines = verify(path, capsys, deaths)
    assert lines.count(f"{reason}: it goes on without one") == 3
