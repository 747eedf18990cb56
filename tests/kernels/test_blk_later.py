"""Requests that are not done on the spot: merged or not, redone where io_uring fails, held up by nobody, in order."""

import ctypes
import fcntl
import os
import re
from pathlib import Path

import numpy as np
import pytest

from kernels import status
from kernels.blk_disk import BOUNCE_ROOM_BYTES
from kernels.blk_queue import TURN
from kernels.request_record import REQUESTS_MAX
from tests.kernels.batch_disk import batch_disk
from tests.kernels.others import by_hand, needs_io_uring, shared
from tests.kernels.test_blk_any_order import KINDS
from tests.kernels.test_rings import LAYOUTS
from tests.mock.blk_driver import FLUSH, GET_ID, IN, IOERR, OK, OUT
from tests.model.blk import DISCARD, WRITE_ZEROES

pytestmark = pytest.mark.timeout(120)

MERGE_BYTES = 64 << 10
PAGE = 4096
PAGE_SECTORS = PAGE // 512


@pytest.fixture(params=["split", "packed"])
def packed(request):
    return request.param == "packed"


def merging(others, **options):
    """A disk that does adjacent requests together."""
    return batch_disk(others, **options, prepare=lambda disk: disk.__setitem__("merge_bytes", MERGE_BYTES))


def in_pages(batch, kind, first, count):
    """Adjacent requests of a page each."""
    requests = []
    for page in range(first, first + count):
        data = bytes([page & 0xFF]) * PAGE if kind == OUT else b""
        requests.append(batch.put(kind, page * PAGE_SECTORS, data, 0 if kind == OUT else PAGE))
    return requests


def check_pages(world, requests, written=()):
    """Every one went well, and what was read is what the image had, or has."""
    image = world.disk.image()
    for request in requests:
        start = request.sector * 512
        assert request.status == OK
        assert request.length == (PAGE + 1 if request.kind == IN else 1)
        assert request.data == image[start : start + PAGE]
        if request.kind == IN and request.sector not in written:
            assert request.data == world.content[start : start + PAGE]


@KINDS
def test_adjacent_requests_are_done_together(packed, kind):
    with merging(shared(kind), packed=packed) as world:
        requests = in_pages(world.batch, IN, 0, 8) + in_pages(world.batch, OUT, 64, 5)
        world.batch.show()
        world.serve_all()
        assert world.board["merges"] == 7 + 4
        assert world.board["redone"] == 0
        check_pages(world, requests)
        world.check_done()


@needs_io_uring
@pytest.mark.parametrize("write_through", [0, 1])
def test_a_polled_ring_of_io_uring_gets_plain_reads_and_writes_only(packed, write_through):
    """Linux refuses the rest (EINVAL), or would have to wait for it."""
    with batch_disk(shared("polled"), packed=packed) as world:
        urings = world.disk.others.urings
        world.rings[0]["write_through"] = write_through
        before = int(urings["submitted"][0])
        requests = in_pages(world.batch, IN, 0, 3) + in_pages(world.batch, OUT, 64, 5)
        flush = world.batch.put(FLUSH)
        world.batch.show()
        world.serve_all()
        assert int(urings["submitted"][0]) - before == (3 if write_through else 8)
        assert (flush.status, world.board["redone"]) == (OK, 0)
        check_pages(world, requests)
        world.check_done()


@needs_io_uring
@pytest.mark.parametrize(
    ("direct", "kind", "at_once"), [(1, IN, True), (1, OUT, True), (0, IN, False), (0, OUT, False)]
)
def test_a_disk_that_is_idle_gets_a_request_before_the_turn_ends(packed, direct, kind, at_once):
    def apart(disk):
        disk["merge_bytes"], disk["direct"] = 0, direct

    with batch_disk(shared("uring"), packed=packed, prepare=apart) as world:
        urings = world.disk.others.urings
        requests = in_pages(world.batch, kind, 0, 32)
        world.batch.show()
        before = int(urings["submitted"][0]), int(urings["enters"][0])
        world.disk.serve_turn(world, 0)
        submitted, enters = int(urings["submitted"][0]) - before[0], int(urings["enters"][0]) - before[1]
        assert (submitted > 0) is at_once
        assert enters < 32 / 2, "the more it has, the more go by one system call"
        world.serve_all()
        assert int(urings["submitted"][0]) - before[0] == 32
        check_pages(world, requests)
        world.check_done()


def one_turn(requests_of):
    """How many helpers are given something for what `requests_of(batch)` puts."""
    with merging(by_hand(16)) as world:
        requests_of(world.batch)
        world.batch.show()
        world.serve()
        given = len(world.disk.others.given())
        merges = int(world.board["merges"])
        finish_by_hand(world)
        world.check_done()
        assert {request.status for request in world.batch.done} == {OK}
        return given, merges


def finish_by_hand(world):
    while world.board["under_way"]:
        for index in world.disk.others.given():
            world.disk.others.do(index)
        world.serve()


def test_what_is_not_merged():
    def with_gap(batch):
        in_pages(batch, IN, 0, 2)
        in_pages(batch, IN, 3, 2)

    def backwards(batch):
        for page in (5, 4, 3):
            in_pages(batch, IN, page, 1)

    def of_two_kinds(batch):
        in_pages(batch, IN, 0, 1)
        in_pages(batch, OUT, 1, 1)

    def too_long(batch):
        in_pages(batch, IN, 0, MERGE_BYTES // PAGE + 1)

    def past_a_flush(batch):
        in_pages(batch, OUT, 0, 1)
        batch.put(FLUSH)
        in_pages(batch, OUT, 1, 1)

    assert one_turn(with_gap) == (2, 2)
    assert one_turn(backwards) == (3, 0)
    assert one_turn(of_two_kinds) == (2, 0)
    assert one_turn(too_long) == (2, MERGE_BYTES // PAGE - 1)
    assert one_turn(past_a_flush) == (3, 0)


def test_nothing_is_merged_across_rings():
    with merging(by_hand(4), rings=2) as world:
        for k, batch in enumerate(world.batches):
            in_pages(batch, IN, k, 1)
            batch.show()
        world.serve()
        assert world.board["merges"] == 0
        finish_by_hand(world)
        for batch in world.batches:
            batch.look()
            check_pages(world, batch.done)
        world.check_done()


@KINDS
def test_the_image_ends_within_a_merged_read(packed, kind):
    with merging(shared(kind), packed=packed) as world:
        pages = len(world.content) // PAGE
        requests = in_pages(world.batch, IN, pages - 4, 4)
        world.batch.show()
        os.ftruncate(world.disk.fd, (pages - 1) * PAGE)
        world.serve_all()
        assert world.board["merges"] == 3
        assert world.board["redone"] == 4
        check_pages(world, requests[:3])
        assert (requests[3].status, requests[3].length) == (IOERR, 1)
        world.check_done()


@KINDS
def test_the_file_takes_no_more_within_a_merged_write(packed, kind):
    sealed = os.memfd_create("sealed", os.MFD_ALLOW_SEALING)
    with merging(shared(kind), packed=packed, fd=sealed) as world:
        pages = len(world.content) // PAGE
        requests = in_pages(world.batch, OUT, pages - 4, 4)
        world.batch.show()
        os.ftruncate(sealed, (pages - 1) * PAGE)
        fcntl.fcntl(sealed, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW)
        world.serve_all()
        assert world.board["redone"] == 4
        assert [request.status for request in requests] == [OK, OK, OK, IOERR]
        assert world.disk.image() == world.content[: (pages - 4) * PAGE] + b"".join(
            request.data for request in requests[:3]
        )
        world.check_done()


def test_a_helper_that_fails_at_merged_ones_does_each_again(packed):
    with merging(by_hand(4), packed=packed) as world:
        requests = in_pages(world.batch, IN, 0, 4)
        world.batch.show()
        world.serve()
        others = world.disk.others
        (index,) = others.given()
        others.do(index, status=status.ERR_IO)
        world.serve()
        assert not world.batch.look(), "nobody has an answer yet"
        assert len(others.given()) == 4
        for index in others.given():
            guilty = others.request_of(index)["sector"] == requests[2].sector
            others.do(index, status=status.ERR_IO if guilty else None)
        world.serve()
        world.batch.look()
        assert requests.pop(2).status == IOERR
        check_pages(world, requests)
        world.check_done()


@KINDS
@pytest.mark.parametrize("bounces", [False, True])
def test_the_image_ends_within_the_first_of_a_merged_read(packed, kind, bounces):
    """Who did a part of it cut the rows, which are whole again when each is done by itself."""
    with merging(shared(kind), packed=packed, bounces=bounces) as world:
        end = len(world.content)
        first = world.batch.put(IN, (end - 3 * PAGE) // 512, b"", 2 * PAGE)
        second = world.batch.put(IN, (end - PAGE) // 512, b"", PAGE)
        world.batch.show()
        os.ftruncate(world.disk.fd, end - 2 * PAGE)
        world.serve_all()
        assert world.board["merges"] == 1
        assert world.board["redone"] == 2
        assert (first.status, second.status) == (IOERR, IOERR)
        world.check_done()


@KINDS
@pytest.mark.parametrize("bounces", [False, True])
def test_the_file_takes_no_more_within_the_first_of_a_merged_write(packed, kind, bounces):
    sealed = os.memfd_create("sealed", os.MFD_ALLOW_SEALING)
    with merging(shared(kind), packed=packed, fd=sealed, bounces=bounces) as world:
        end = len(world.content)
        first = world.batch.put(OUT, (end - 3 * PAGE) // 512, b"A" * PAGE + b"B" * PAGE, 0)
        second = world.batch.put(OUT, (end - PAGE) // 512, b"C" * PAGE, 0)
        world.batch.show()
        os.ftruncate(sealed, end - 2 * PAGE)
        fcntl.fcntl(sealed, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW)
        world.serve_all()
        assert world.board["redone"] == 2
        assert (first.status, second.status) == (IOERR, IOERR)
        kept, written = world.content[: end - 3 * PAGE], world.disk.image()[end - 3 * PAGE :]
        assert world.disk.image()[: end - 3 * PAGE] == kept
        assert written in (b"A" * PAGE, world.content[end - 3 * PAGE : end - 2 * PAGE]), "its own data, or none"
        world.check_done()


def test_a_ring_is_blocked_no_longer_than_something_is_under_way():
    """A worker that looked at other rings meanwhile goes to sleep by what this says."""
    with batch_disk(by_hand(4), in_order=True) as world:
        for _ in range(2):
            world.batch.put(FLUSH)
        world.batch.show()
        world.disk.serve_turn(world)
        assert world.rings[0]["blocked"] == 1
        (index,) = world.disk.others.given()
        world.disk.others.do(index)
        assert world.disk.end_some(world) == 1
        assert world.rings[0]["blocked"] == 0
        world.serve()
        finish_by_hand(world)
        world.check_done()


@pytest.fixture
def direct_file(tmp_path):
    """A file that takes O_DIRECT when `direct` has switched it on."""
    path = tmp_path / "image"
    path.write_bytes(b"")
    try:
        os.close(os.open(path, os.O_RDWR | os.O_DIRECT))
    except OSError as error:
        pytest.skip(f"no O_DIRECT in {tmp_path}: {error}")
    return os.open(path, os.O_RDWR)


def direct(world):
    os.fsync(world.disk.fd)
    fcntl.fcntl(world.disk.fd, fcntl.F_SETFL, os.O_RDWR | os.O_DIRECT)
    world.disk.disks["direct"] = 1
    world.disk.begin()


def image_of(world):
    fcntl.fcntl(world.disk.fd, fcntl.F_SETFL, os.O_RDWR)
    return world.disk.image()


@KINDS
def test_memory_that_direct_io_does_not_take_is_copied(packed, kind, direct_file):
    with merging(shared(kind), packed=packed, fd=direct_file) as world:
        direct(world)
        batch, data = world.batch, os.urandom(PAGE)
        place = world.memory.allocate(6 * PAGE, PAGE)
        odd_read = batch.put(IN, 8, size=PAGE, buffer=place + 3)
        odd_write = batch.put(OUT, 32, data, buffer=place + 2 * PAGE + 1)
        even = batch.put(IN, 64, size=PAGE, buffer=place + 4 * PAGE)
        batch.show()
        world.serve_all()
        assert world.board["redone"] == (2 if kind != "helpers" else 0)
        assert [request.status for request in (odd_read, odd_write, even)] == [OK] * 3
        assert odd_read.data == world.content[8 * 512 : 8 * 512 + PAGE]
        assert even.data == world.content[64 * 512 : 64 * 512 + PAGE]
        world.check_done()
        assert image_of(world)[32 * 512 : 32 * 512 + PAGE] == data


def kernel_page():
    """Address of a page of this process that direct I/O cannot pin: the kernel's own, for the clock."""
    found = re.search(r"^([0-9a-f]+)-\S+ r\S+ .*\[vvar\]$", Path("/proc/self/maps").read_text(), re.M)
    if not found:
        pytest.skip("no [vvar] page")
    return int(found[1], 16)


@KINDS
def test_memory_that_cannot_be_pinned_is_copied(packed, kind, direct_file):
    """As a PCI BAR, which is what a device VM sees of its sibling's memory: EFAULT."""
    with merging(shared(kind), packed=packed, fd=direct_file) as world:
        direct(world)
        page = kernel_page()
        here = 1 << 40
        world.regions = np.array([*world.regions, [here, PAGE, page, 0, 1]], np.uint64)
        world.memory.write = refuse_above(world.memory.write, here)
        batch, urings = world.batch, world.disk.others.urings
        odd = batch.put(OUT, 8, bytes(PAGE), buffer=here)
        even = batch.put(OUT, 32, b"e" * PAGE, buffer=world.memory.allocate(PAGE, PAGE))
        batch.show()
        world.serve_all()
        assert (odd.status, even.status) == (OK, OK)
        assert world.board["redone"] == (1 if kind != "helpers" else 0)
        # From then on io_uring reads and writes a copy.
        before = int(urings["submitted"][0])
        read, long_read = batch.put(IN, 64, size=2 * PAGE), batch.put(IN, 128, size=BOUNCE_ROOM_BYTES + 512)
        again = batch.put(OUT, 96, b"a" * PAGE, buffer=world.memory.allocate(PAGE, PAGE))
        batch.show()
        world.serve_all()
        assert int(urings["submitted"][0]) - before == (2 if kind != "helpers" else 0)
        assert world.board["redone"] == (1 if kind != "helpers" else 0)
        for request in (read, long_read):
            start = request.sector * 512
            assert (request.status, request.data) == (OK, world.content[start : start + len(request.data)])
        assert again.status == OK
        world.check_done()
        image = image_of(world)
        assert image[96 * 512 : 96 * 512 + PAGE] == b"a" * PAGE
        assert image[32 * 512 : 32 * 512 + PAGE] == b"e" * PAGE
        written, seen = image[8 * 512 : 8 * 512 + PAGE], ctypes.string_at(page, PAGE)
        assert sum(a != b for a, b in zip(written, seen, strict=True)) < 256, "but for what the clock has changed"
        assert written != world.content[8 * 512 : 8 * 512 + PAGE]


def refuse_above(write, limit):
    """A driver does not write to the page that it has from the kernel."""

    def limited(gpa, data):
        if gpa < limit:
            write(gpa, data)

    return limited


def test_more_requests_than_slots(packed):
    """Three rings want more than there is; none gets lost, and each ring gets no more than half."""
    with batch_disk(by_hand(4), packed=packed, rings=3) as world:
        source = world.memory.allocate(512)
        world.memory.write(source, b"s" * 512)
        each = 300
        for k, batch in enumerate(world.batches):
            for number in range(each):
                batch.put(OUT, k * each + number, b"s" * 512, buffer=source)
            batch.show()
        for _ in range(-(-each // TURN)):
            world.serve()
        assert world.board["under_way"] == REQUESTS_MAX
        under_way = world.rings["under_way"].tolist()
        assert sum(under_way) == REQUESTS_MAX
        assert max(under_way) == REQUESTS_MAX // 2
        assert world.rings["blocked"].tolist() == [1, 1, 1]
        assert [world.inflight(index) for index in range(3)] == under_way
        finish_by_hand(world)
        world.serve_all()
        world.check_done()
        assert [len(batch.done) for batch in world.batches] == [each] * 3
        assert world.disk.image() == b"s" * 512 * 3 * each + world.content[3 * each * 512 :]


@KINDS
def test_a_ring_of_many_requests(packed, kind):
    with batch_disk(shared(kind), packed=packed) as world:
        for _ in range(3):
            for sector in range(0, 2048, 7):
                world.batch.put(IN, sector, size=512)
            world.batch.show()
            world.serve_all()
        for request in world.batch.done:
            assert request.data == world.content[request.sector * 512 : request.sector * 512 + 512]
        world.check_done()


def test_a_slow_flush_holds_up_no_reads(packed):
    with batch_disk(by_hand(4), packed=packed, mapped=True) as world:
        batch, others = world.batch, world.disk.others
        slow = batch.put(FLUSH)
        reads = [batch.put(IN, sector, size=512) for sector in range(100)]
        batch.show()
        world.serve()
        assert batch.look() == reads
        assert world.inflight() == 1
        reads = [batch.put(IN, sector, size=512) for sector in range(100, 140)]
        batch.show()
        world.serve()
        assert batch.look() == reads
        assert slow.status is None
        (index,) = others.given()
        others.do(index)
        world.serve()
        assert batch.look() == [slow]
        assert slow.status == OK
        for request in batch.done[:140]:
            assert request.data == world.content[request.sector * 512 : request.sector * 512 + 512]
        world.check_done()


def test_a_slow_request_holds_up_none_of_the_other_helpers(packed):
    with batch_disk(by_hand(2), packed=packed) as world:
        batch, others = world.batch, world.disk.others
        slow = batch.put(OUT, 0, b"s" * 512)
        more = [batch.put(IN, sector, size=512) for sector in (8, 16, 24)]
        batch.show()
        world.serve()
        stuck = next(index for index in others.given() if others.request_of(index)["sector"] == 0)
        for request in more:
            (index,) = [index for index in others.given() if index != stuck]
            others.do(index)
            world.serve()
            assert batch.look() == [request]
        assert world.inflight() == 1
        others.do(stuck)
        world.serve()
        assert batch.look() == [slow]
        world.check_done()


def every_kind(batch):
    """One of each, some of which take no waiting and some of which do."""
    zeroes = (40).to_bytes(8, "little") + (8).to_bytes(4, "little") + bytes(4)
    return [
        batch.put(IN, 0, size=512),
        batch.put(FLUSH),
        batch.put(GET_ID, size=20),
        batch.put(OUT, 8, b"o" * PAGE),
        batch.put(WRITE_ZEROES, 0, zeroes),
        batch.put(IN, 40, size=PAGE),
        batch.put(99),
        batch.put(DISCARD, 0, zeroes),
        batch.put(IN, 8, size=PAGE),
        batch.put(IN, 1 << 40, size=512),
        batch.put(OUT, 16, b"p" * PAGE),
        batch.put(FLUSH),
    ]


ENGINES = {
    "mmap": {"mapped": True},
    "uring": {},
    "sync": {"prepare": lambda disk: disk.__setitem__("nowait", 1)},
}


@KINDS
@pytest.mark.parametrize("engine", list(ENGINES))
def test_in_order(packed, kind, engine):
    """VIRTIO_F_IN_ORDER (virtio 1.2, 2.7.9 and 2.8.16)."""
    with batch_disk(shared(kind), packed=packed, in_order=True, **ENGINES[engine]) as world:
        for _ in range(5):
            expected = every_kind(world.batch)
            world.batch.show()
            world.serve_all()
            assert world.batch.done[-len(expected) :] == expected
            assert [request.status for request in expected] == [OK] * 6 + [2, OK, OK, IOERR, OK, OK]
            assert expected[5].data == bytes(PAGE)
            assert expected[8].data == b"o" * PAGE
        world.check_done()


def test_in_order_nothing_overtakes_a_slow_request(packed):
    with batch_disk(by_hand(4), packed=packed, in_order=True, mapped=True) as world:
        batch, others = world.batch, world.disk.others
        first, slow = batch.put(IN, 0, size=512), batch.put(FLUSH)
        behind = [batch.put(IN, sector, size=512) for sector in range(1, 20)]
        batch.show()
        for _ in range(3):
            world.serve()
        assert batch.look() == [first]
        assert world.rings["blocked"][0] == 1
        (index,) = others.given()
        others.do(index)
        world.serve()
        assert batch.look() == [slow]
        world.serve()
        assert batch.look() == behind
        world.check_done()


@LAYOUTS
def test_used_elements_are_published_in_groups_and_all_of_them(packed):
    """However many are done in one turn, the driver sees every one at its end."""
    with batch_disk(shared("alone"), packed=packed, mapped=True) as world:
        for count in (1, 7, 8, 9, 16, 17, 100):
            expected = [world.batch.put(IN, sector, size=512) for sector in range(count)]
            world.batch.show()
            world.serve()
            assert world.batch.look() == expected
        world.check_done()
