from itertools import pairwise

import numba
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import driver_layout as layout
from kernels import driver_random

pytestmark = pytest.mark.timeout(120)


@numba.njit
def multiply_high(left, right):
    return driver_random.multiply_high(left, right)  # an intrinsic: callable from compiled code only


U64 = st.integers(0, 2**64 - 1)


def order(blocks, seed):
    job = np.zeros(1, layout.JOB)
    job["blocks"] = blocks
    driver_random.start_order(job[0], np.uint64(seed))
    return [int(driver_random.next_in_order(job[0])) for _ in range(blocks)]


@settings(max_examples=60, deadline=None)
@given(blocks=st.integers(1, 700), seed=U64)
def test_an_order_has_every_block_once(blocks, seed):
    assert sorted(order(blocks, seed)) == list(range(blocks))


def test_orders_differ_and_are_not_sequential():
    first, second = order(4096, 1), order(4096, 2)
    assert first != second
    neighbours = sum(abs(a - b) == 1 for a, b in pairwise(first))
    assert neighbours < 40  # a sequential one has 4095, a random one about 2


@given(left=U64, right=U64)
@settings(deadline=None)
def test_multiply_high(left, right):
    assert int(multiply_high(np.uint64(left), np.uint64(right))) == left * right >> 64


def test_random_blocks_are_spread_evenly():
    job = np.zeros(1, layout.JOB)
    counts = [0] * 10
    for _ in range(10_000):
        counts[int(multiply_high(np.uint64(driver_random.next_random(job[0])), np.uint64(10)))] += 1
    assert all(850 < count < 1150 for count in counts)


@settings(max_examples=40, deadline=None)
@given(seed=U64, block=st.integers(0, 2**40), generation=st.integers(0, 1000), byte=st.integers(0, 511))
def test_a_pattern_is_its_own_and_no_other(seed, block, generation, byte):
    buffer = np.zeros(512, np.uint8)
    address, length = np.uint64(buffer.ctypes.data), np.uint64(512)

    def start(*what):
        return np.uint64(driver_random.pattern_start(*(np.uint64(number) for number in what)))

    driver_random.fill_pattern(address, length, start(seed, block, generation))
    assert driver_random.holds_pattern(address, length, start(seed, block, generation))
    for other in ((seed, block + 1, generation), (seed, block, generation + 1), (seed ^ 1, block, generation)):
        assert not driver_random.holds_pattern(address, length, start(*other))
    buffer[byte] ^= 1
    assert not driver_random.holds_pattern(address, length, start(seed, block, generation))
