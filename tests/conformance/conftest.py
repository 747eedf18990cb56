"""One back-end for each transport and module; every test connects to it anew, so each test also tests reconnecting."""

import random

import pytest

from tests.conformance.carriers import CARRIERS

IMAGE_BYTES = 8 << 20


@pytest.fixture(scope="module", params=list(CARRIERS))
def carrier_name(request):
    return request.param


@pytest.fixture(scope="module")
def carrier(carrier_name):
    return CARRIERS[carrier_name]


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    path = tmp_path_factory.mktemp("image") / "disk.img"
    path.write_bytes(random.Random(1).randbytes(IMAGE_BYTES))
    return path


@pytest.fixture(scope="module")
def backend(carrier, carrier_name, image, tmp_path_factory):
    with carrier(
        tmp_path_factory.mktemp("backend"), image, "--serial", "conformance-1", "--num-queues", "4"
    ) as running:
        running.name = carrier_name
        yield running
