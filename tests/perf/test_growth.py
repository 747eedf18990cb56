"""The front-end of the growth curves: memory cut into regions, queues that idle, and a short run."""

import asyncio

import pytest

from perf import growth, growth_front_end
from perf.backends import Backend


@pytest.mark.parametrize("regions", [1, 2, 8, 500])
def test_regions_cover_the_memory(regions):
    pieces = growth_front_end.cut(256 << 20, regions, 4 << 20)
    assert len(pieces) == regions
    end = 0
    for start, size in pieces:
        assert (start, start % 4096, size % 4096) == (end, 0, 0)
        end = start + size
    assert end == 256 << 20


def test_a_curve_has_medians_in_order():
    rows = [(4, 1.0), (1, 3.0), (4, 2.0), (4, 9.0)]
    records = [{"curve": "queues", "depth": 32, "x": x, "cpu_us": y, "p50_us": 0} for x, y in rows]
    assert growth.medians(records, "queues", 32) == [(1, 3.0), (4, 2.0)]


@pytest.mark.parametrize("more", [{"vrings": 64}, {"regions": 8}, {"regions": 40}])
def test_requests_are_done_whatever_there_is_besides(tmp_path, more):
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(4 << 20))

    async def measure(running):
        async with growth_front_end.connected(running, 0, **more) as front_end:
            await front_end.sweep(range_bytes=4 << 20)
            return await front_end.measure(0.1, 32, range_bytes=4 << 20, over_regions=more.get("regions", 1))

    with Backend("vvupipe", "socket", None).start(tmp_path / "b", image, 0, queues=64) as running:
        point = asyncio.run(measure(running))
    assert point.requests > 100
    assert point.cpu_us > 0
