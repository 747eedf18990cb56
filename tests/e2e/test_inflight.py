"""The embedded sibling and two back-ends: a mock that completes out of order and dies, then vvupipe."""

import json
import mmap
import os

import pytest

from tests.mock.blk_backend import WITH_INFLIGHT, BlkBackend

pytestmark = pytest.mark.timeout(120)
SIZE = 16 << 20


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "disk.img"
    path.write_bytes(os.urandom(SIZE))
    return path


class Dying:
    """Serves until many requests are under way, then does `choose` of them, last, and stops listening without a word.

    `tells`: the inflight region says that they are done; otherwise it died between the used ring and the region.
    """

    def __init__(self, path, content, choose, *, tells):
        self.backend = BlkBackend(path, content, protocol=WITH_INFLIGHT)
        self.backend.prepare, self.backend.after = self._prepare, self._after
        self._choose, self._tells = choose, tells
        self.device = self.chosen = None

    def _prepare(self, device):
        self.device = device
        device.choose = self._choose_now

    def _choose_now(self, taken):
        if len(taken) < 8 or len(self.device.log) < 200:
            return list(taken)
        self.chosen = self._choose(taken)
        self.device.take = lambda: 0  # what the driver adds from here on is the next one's
        if not self._tells:
            self.device.inflight.note_published = lambda batch, used_idx: None
        return self.chosen

    def _after(self, served):
        if self.chosen is None:
            return None
        self.backend.end()
        return "leave"


CHOICES = {"the last": lambda taken: taken[-1:], "every other one, backwards": lambda taken: taken[::-2]}


@pytest.mark.parametrize("tells", [True, False])
@pytest.mark.parametrize("choice", CHOICES)
def test_the_next_back_end_does_what_the_first_left(scene, image, choice, tells):
    with image.open("r+b") as file, mmap.mmap(file.fileno(), SIZE) as content:
        dying = Dying(scene.socket, content, CHOICES[choice], tells=tells)
        with dying.backend:
            sibling = scene.sibling("--workload", "verify", "--iodepth", "32")
            dying.backend.wait(60)
        left = len(dying.device.taken)
        assert left >= 4
        assert set(dying.device.inflight.inflight()) == {*dying.device.taken, *([] if tells else dying.chosen)}
    assert sibling.poll() is None, "it waits for the next"
    backend = scene.start("device", "block", "--socket", scene.socket, "--file", image, "--num-queues", "2", "--json")
    printed, _ = sibling.communicate(timeout=60)
    found = json.loads(printed.splitlines()[-1])
    work = found["workload"]
    assert (sibling.returncode, found["reconnects"]) == (0, 1), printed
    assert (work["mismatches"], work["errors"], work["unfinished"]) == (0, 0, 0)
    assert work["verified_blocks"] == SIZE // 4096
    assert "anew" not in printed
    status, said = scene.end(backend)
    assert status == 0
    assert f"vring 0: {left} requests that were under way are done again" in said
