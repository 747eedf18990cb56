"""Random numbers, a random order of blocks that needs no memory, and the pattern that verify writes."""

import numpy as np
from llvmlite import ir
from numba import types, uint64
from numba.extending import intrinsic

from kernels.jit import kernel
from kernels.memory import load_u64, store_u64

# Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators (SplitMix64).
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_ONE = np.uint64(1)
_ZERO = np.uint64(0)


@intrinsic
def multiply_high(typing_context, left, right):
    """Upper 64 bits of the product of two uint64: maps a random number to 0..right-1 without a division."""

    def generate(context, builder, signature, arguments):
        wide = ir.IntType(128)
        product = builder.mul(builder.zext(arguments[0], wide), builder.zext(arguments[1], wide))
        return builder.trunc(builder.lshr(product, ir.Constant(wide, 64)), ir.IntType(64))

    return types.uint64(types.uint64, types.uint64), generate


@kernel
def mix(value):
    """Scatter a uint64 over all 64 bits; one to one."""
    value = (value ^ (value >> uint64(30))) * _MIX_1
    value = (value ^ (value >> uint64(27))) * _MIX_2
    return value ^ (value >> uint64(31))


@kernel
def next_random(job):
    """The next 64 random bits of job.random."""
    job.random += _GOLDEN
    return mix(job.random)


@kernel
def start_order(job, seed):
    """Begin a random order of the blocks 0..job.blocks-1 that depends on `seed` alone."""
    mask = _ZERO
    bits = _ZERO
    while mask < job.blocks - _ONE:
        mask = (mask << _ONE) | _ONE
        bits += _ONE
    first = mix(seed)
    second = mix(first + _GOLDEN)
    job.order_mask = mask
    # Hull and Dobell: with an odd increment and a multiplier of 1 modulo 4 all 2^n values come before one comes again.
    job.order_multiplier = (first & ~uint64(7)) | uint64(5)
    job.order_increment = second | _ONE
    job.order_x = mix(second) & mask
    job.order_shift = max(_ONE, bits >> _ONE)


@kernel
def next_in_order(job):
    """The next block of the order; every block once in job.blocks calls."""
    while True:
        x = (job.order_x * job.order_multiplier + job.order_increment) & job.order_mask
        job.order_x = x
        # The low bits of x alone have short periods; these three steps are one to one as well.
        x ^= x >> job.order_shift
        x = (x * _GOLDEN) & job.order_mask
        x ^= x >> job.order_shift
        if x < job.blocks:
            return x


@kernel
def pattern_start(seed, block, generation):
    """First word of the pattern of a block."""
    return mix(mix(mix(seed) + block) + generation)


@kernel
def fill_pattern(address, length, start):
    """Write the pattern that begins with `start` to `length` bytes (a multiple of 8)."""
    word = start
    for k in range(length >> uint64(3)):
        store_u64(address + uint64(8) * uint64(k), word)
        word += _GOLDEN


@kernel
def holds_pattern(address, length, start):
    """Whether `length` bytes are the pattern that begins with `start`."""
    word = start
    different = _ZERO
    for k in range(length >> uint64(3)):
        different |= load_u64(address + uint64(8) * uint64(k)) ^ word
        word += _GOLDEN
    return different == _ZERO
