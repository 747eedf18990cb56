"""The job kernels against a device in plain Python that runs in another thread."""

import os
import threading

import numpy as np
import pytest

from kernels import driver_layout as layout
from kernels import driver_random
from kernels.driver_transfer import transfer
from kernels.driver_verify import drive_verify
from kernels.driver_workload import drive
from tests.kernels.driver_bench import DATA, DriverBench
from tests.mock.blk_device import FLUSH, IN, IOERR, OK, OUT

pytestmark = pytest.mark.timeout(120)
BLOCKS = 128


class Served:
    """Serves a bench's ring until left; calls after each turn, wanted or not."""

    def __init__(self, bench):
        self.bench, self.stop = bench, threading.Event()
        self.thread = threading.Thread(target=self._run)
        self.error = None

    def _run(self):
        try:
            while not self.stop.is_set():
                if self.bench.device.serve():
                    os.eventfd_write(self.bench.call_fd, 1)
                self.stop.wait(0.0002)
        except BaseException as error:
            self.error = error
            # Let the kernel see that something is wrong instead of waiting for ever.
            self.bench.device.jump = 1000
            self.bench.device.publish()
            os.eventfd_write(self.bench.call_fd, 1)

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.stop.set()
        self.thread.join()
        if self.error:
            raise self.error


@pytest.fixture(params=["indirect", "direct"])
def bench(request):
    made = DriverBench(size=32, depth=8, indirect=request.param == "indirect")
    made.set_job(blocks=BLOCKS, block_bytes=512, block_sectors=1, only=IN)
    yield made
    made.close()


def test_workload_does_what_was_asked_for(bench):
    bench.set_job(limit=500, only=-1, read_share=2**64 * 3 // 4, random=5)
    with Served(bench):
        assert bench.run(drive) == layout.DONE
    kinds = [kind for kind, _, _ in bench.device.log]
    assert len(kinds) == 500
    assert 330 < kinds.count(IN) < 420
    assert kinds.count(IN) == bench.directions[layout.READ]["requests"] == bench.histograms[layout.READ].sum()
    assert kinds.count(OUT) == bench.directions[layout.WRITE]["requests"] == bench.histograms[layout.WRITE].sum()
    sectors = {sector for _, sector, _ in bench.device.log}
    assert sectors <= set(range(BLOCKS))
    assert len(sectors) > BLOCKS * 0.9


def test_sequential_blocks_follow_each_other_and_wrap(bench):
    bench.set_job(limit=BLOCKS + 40, order=layout.SEQUENTIAL, first_sector=1)
    with Served(bench):
        assert bench.run(drive) == layout.DONE
    # Tags come back in order from this device, so the log is the order of submission.
    assert [sector - 1 for _, sector, _ in bench.device.log] == [k % BLOCKS for k in range(BLOCKS + 40)]


def test_a_runtime_ends_it_with_nothing_in_flight(bench):
    bench.set_job(runtime_ns=100_000_000)
    with Served(bench):
        assert bench.run(drive) == layout.DONE
    assert bench.ring["in_flight"] == 0
    assert 90_000_000 < bench.record["ended_ns"][0] - bench.record["started_ns"][0] < 2_000_000_000


def test_a_command_interrupts_and_the_job_goes_on(bench):
    bench.set_job(limit=3000)
    with Served(bench):
        threading.Timer(0.05, lambda: bench.record["attention"].__setitem__(0, 1)).start()
        assert bench.run(drive) == layout.COMMAND
        before = int(bench.job["issued"][0])
        assert 0 < before < 3000
        bench.wait["attention_seen"] = 1
        assert bench.run(drive) == layout.DONE
    assert len(bench.device.log) == 3000


def test_a_command_wakes_a_sleeper(bench):
    bench.set_job(limit=1)  # and no device at all
    threading.Timer(0.2, os.eventfd_write, (bench.command_fd, 1)).start()
    assert bench.run(drive) == layout.COMMAND
    assert bench.wait["sleeps"][0] == 1


def test_errors_are_counted_with_the_first_place(bench):
    bench.set_job(limit=BLOCKS, order=layout.SEQUENTIAL)
    bench.device.status = lambda kind, sector: IOERR if sector in (70, 90) else OK
    with Served(bench):
        assert bench.run(drive) == layout.DONE
    record = bench.record[0]
    assert (record["errors"], record["first_error_sector"], record["first_error_status"]) == (2, 70, IOERR)
    assert bench.directions[layout.READ]["requests"] == BLOCKS - 2


def test_a_lying_device_ends_the_job(bench):
    bench.set_job(limit=100)
    bench.device.used = lambda head, written: [(31, written)]
    with Served(bench):
        assert bench.run(drive) == layout.ERR_USED_ID


def verify(bench, **job):
    bench.set_job(seed=77, can_flush=1, **job)
    with Served(bench):
        return bench.run(drive_verify)


def test_verify_passes_on_an_honest_disk(bench):
    assert verify(bench) == layout.DONE
    record = bench.record[0]
    assert (record["mismatches"], record["verified_blocks"], record["passes"]) == (0, BLOCKS, 1)
    kinds = [kind for kind, _, _ in bench.device.log]
    assert kinds == [OUT] * BLOCKS + [FLUSH] + [IN] * BLOCKS
    writes = [sector for kind, sector, _ in bench.device.log if kind == OUT]
    reads = [sector for kind, sector, _ in bench.device.log if kind == IN]
    assert sorted(writes) == sorted(reads) == list(range(BLOCKS))
    assert writes != reads
    for block in (0, BLOCKS - 1):
        content = np.frombuffer(bytes(bench.image[block * 512 : block * 512 + 512]), np.uint8).copy()
        start = np.uint64(driver_random.pattern_start(np.uint64(77), np.uint64(block), np.uint64(0)))
        assert driver_random.holds_pattern(np.uint64(content.ctypes.data), np.uint64(512), start)


class Lossy(bytearray):
    """An image that does something else with the write to one sector."""

    def __init__(self, size, sector, change):
        super().__init__(size)
        self.sector, self.change = sector, change

    def __setitem__(self, where, content):
        if where.start == self.sector * 512:
            where, content = self.change(where, bytes(content))
        if content is not None:
            super().__setitem__(where, content)


CHANGES = {
    "one bit": lambda where, content: (where, content[:300] + bytes([content[300] ^ 4]) + content[301:]),
    "lost write": lambda where, content: (where, None),
    "torn write": lambda where, content: (slice(where.start, where.start + 256), content[:256]),
}


@pytest.mark.parametrize("change", CHANGES)
def test_verify_finds_what_a_disk_did_wrong(bench, change):
    bench.image = bench.device.image = Lossy(BLOCKS * 512, 41, CHANGES[change])
    assert verify(bench) == layout.DONE
    record = bench.record[0]
    assert (record["mismatches"], record["first_mismatch_bytes"]) == (1, 41 * 512)


def test_verify_finds_a_write_that_went_elsewhere(bench):
    moved = Lossy(BLOCKS * 512, 41, lambda where, content: (slice(7 * 512, 8 * 512), content))
    bench.image = bench.device.image = moved
    assert verify(bench) == layout.DONE
    assert bench.record[0]["mismatches"] >= 1


def test_verify_finds_a_read_that_was_not_delivered(bench):
    """With one block and one buffer, what was written is still in memory when it is read back."""
    bench.device.delivers = False
    assert verify(bench, blocks=1) == layout.DONE
    assert bench.record[0]["mismatches"] == 1


def test_verify_finds_a_block_of_the_pass_before(bench):
    """A second pass whose writes are lost reads the first one's blocks."""
    written = []

    def first_only(where, content):
        written.append(content)
        return where, content if len(written) == 1 else None

    bench.image = bench.device.image = Lossy(BLOCKS * 512, 41, first_only)
    assert verify(bench, runtime_ns=400_000_000) == layout.DONE
    record = bench.record[0]
    assert len(written) > 1
    assert record["first_mismatch_bytes"] == 41 * 512
    assert record["mismatches"] == len(written) - 1


def test_verify_that_runs_out_of_time_reads_back_what_it_wrote(bench):
    bench.device.status = lambda kind, sector: threading.Event().wait(0.005) or OK
    assert verify(bench, runtime_ns=100_000_000) == layout.DONE
    writes = {sector for kind, sector, _ in bench.device.log if kind == OUT}
    reads = [sector for kind, sector, _ in bench.device.log if kind == IN]
    assert 0 < len(writes) < BLOCKS
    assert sorted(writes) == sorted(reads)
    record = bench.record[0]
    assert (record["mismatches"], record["passes"]) == (0, 0)


def window(bench, kind, path, size_bytes, flags=os.O_RDWR | os.O_CREAT):
    fd = os.open(path, flags)
    bench.set_job(
        kind=kind,
        file_fd=fd,
        window=bench.ring["ram"] + np.uint64(DATA),
        total_bytes=size_bytes,
        chunk_bytes=1024,
        chunks=-(-size_bytes // 1024),
    )
    try:
        with Served(bench):
            return bench.run(transfer)
    finally:
        os.close(fd)


@pytest.mark.parametrize("size_bytes", [512, 1024, 1536, 40 << 10])
def test_transfer_moves_every_byte(bench, tmp_path, size_bytes):
    content = os.urandom(size_bytes)
    bench.image[:size_bytes] = content
    path = tmp_path / "file"
    assert window(bench, IN, path, size_bytes) == layout.DONE
    assert path.read_bytes() == content
    assert bench.read(DATA, size_bytes) == content
    assert bench.record["done_bytes"][0] == size_bytes


def test_transfer_from_a_file(bench, tmp_path):
    content = os.urandom(33 * 512)
    path = tmp_path / "file"
    path.write_bytes(content)
    assert window(bench, OUT, path, len(content)) == layout.DONE
    assert bench.image[: len(content)] == content


def test_transfer_from_a_file_that_ends_early(bench, tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(1000))
    assert window(bench, OUT, path, 4096) == layout.ERR_FILE
    assert bench.record["file_errno"][0] == 0
    assert bench.ring["in_flight"] == 0


def test_transfer_tells_why_the_file_failed(bench):
    assert window(bench, IN, "/dev/full", 64 << 9, os.O_WRONLY) == layout.ERR_FILE
    assert bench.record["file_errno"][0] == 28  # ENOSPC
    assert bench.ring["in_flight"] == 0


def test_transfer_stops_after_an_error(bench, tmp_path):
    bench.device.status = lambda kind, sector: IOERR if sector == 4 else OK
    assert window(bench, IN, tmp_path / "file", 60 << 10) == layout.DONE
    record = bench.record[0]
    assert (record["errors"], record["first_error_sector"]) == (1, 4)
    assert record["done_bytes"] < 60 << 10
