"""Raw memory and libc: the only module of the project whose code follows an address.

Every function takes addresses as uint64. Who calls one has checked that the bytes are mapped in this process; the
checks are in `regions`. Loads of guest memory are atomic, so that a value is read exactly once and cannot be read
again by the compiler after it was checked.
"""

import mmap
import platform

import llvmlite.binding as llvm
import numba
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from numba.np.arrayobj import make_array, populate_array

from kernels.jit import kernel

_I8 = ir.IntType(8)
_INTEGERS = {8: types.uint8, 16: types.uint16, 32: types.uint32, 64: types.uint64}
PAGE_BYTES = mmap.PAGESIZE
IS_X86 = platform.machine() == "x86_64"


def _pointer(builder, address, bits):
    return builder.inttoptr(address, ir.IntType(bits).as_pointer())


def _pointer_to(kind, builder, address, offset):
    return builder.inttoptr(builder.add(address, ir.Constant(ir.IntType(64), offset)), kind.as_pointer())


def _load(bits, ordering):
    result = _INTEGERS[bits]

    @intrinsic
    def load(typing_context, address):
        def generate(context, builder, signature, arguments):
            return builder.load_atomic(_pointer(builder, arguments[0], bits), ordering, bits // 8)

        return result(types.uint64), generate

    return load


def _store(bits, ordering):
    value_type = _INTEGERS[bits]

    @intrinsic
    def store(typing_context, address, value):
        def generate(context, builder, signature, arguments):
            builder.store_atomic(arguments[1], _pointer(builder, arguments[0], bits), ordering, bits // 8)
            return context.get_dummy_value()

        return types.void(types.uint64, value_type), generate

    return store


load_u8 = _load(8, "monotonic")
load_u16 = _load(16, "monotonic")
load_u32 = _load(32, "monotonic")
load_u64 = _load(64, "monotonic")
load_acquire_u16 = _load(16, "acquire")
load_acquire_u32 = _load(32, "acquire")
store_u8 = _store(8, "monotonic")
store_u16 = _store(16, "monotonic")
store_u32 = _store(32, "monotonic")
store_u64 = _store(64, "monotonic")
store_release_u8 = _store(8, "release")
store_release_u16 = _store(16, "release")
store_release_u32 = _store(32, "release")
load_acquire_u64 = _load(64, "acquire")
store_release_u64 = _store(64, "release")


def _modify(operation, bits):
    kind = _INTEGERS[bits]

    @intrinsic
    def modify(typing_context, address, operand):
        def generate(context, builder, signature, arguments):
            builder.atomic_rmw(operation, _pointer(builder, arguments[0], bits), arguments[1], "seq_cst")
            return context.get_dummy_value()

        return types.void(types.uint64, kind), generate

    return modify


#: Set bits of a byte, or add to a number, that others change at the same time.
or_u8 = _modify("or", 8)
add_u64 = _modify("add", 64)


@intrinsic
def full_fence(typing_context):
    """Order every earlier store before every later load (virtio 1.2, 2.7.10 and 2.7.13.4)."""

    def generate(context, builder, signature, arguments):
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic
def spin_hint(typing_context):
    """Tell the CPU that this is a spin loop (x86 `pause`; elsewhere nothing, inline assembly aborts numba)."""

    def generate(context, builder, signature, arguments):
        if IS_X86:
            function = builder.module.declare_intrinsic("llvm.x86.sse2.pause", (), ir.FunctionType(ir.VoidType(), ()))
            builder.call(function, ())
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic
def cycle_counter(typing_context):
    """A counter that goes up by time: x86's time-stamp counter (rdtsc), on aarch64 the virtual timer (CNTVCT_EL0).

    Both run at a rate of their own, whatever the CPU's clock is; instructions before and after it may pass it.
    """

    def generate(context, builder, signature, arguments):
        kind = ir.FunctionType(ir.IntType(64), ())
        return builder.call(builder.module.declare_intrinsic("llvm.readcyclecounter", (), kind), ())

    return types.uint64(), generate


def _prefetch(write, keep):
    @intrinsic
    def fetch(typing_context, address):
        def generate(context, builder, signature, arguments):
            pointer = _I8.as_pointer()
            words = [ir.IntType(32)] * 3
            kind = ir.FunctionType(ir.VoidType(), [pointer, *words])
            function = builder.module.declare_intrinsic("llvm.prefetch", (pointer,), kind)
            hints = [ir.Constant(ir.IntType(32), value) for value in (write, keep, 1)]
            builder.call(function, (builder.inttoptr(arguments[0], pointer), *hints))
            return context.get_dummy_value()

        return types.void(types.uint64), generate

    return fetch


#: Ask the cache for the line at an address, to be read soon, or to be written. A hint: no address can make it fault.
prefetch = _prefetch(0, 3)
prefetch_write = _prefetch(1, 3)
#: For what is read a little later: it goes into the second-level cache only.
prefetch_early = _prefetch(0, 2)


@intrinsic
def copy_bytes(typing_context, destination, source, count):
    """memcpy: `count` bytes; the two must not overlap."""

    def generate(context, builder, signature, arguments):
        destination, source, count = arguments
        pointer = _I8.as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [pointer, pointer, ir.IntType(64), ir.IntType(1)])
        function = builder.module.declare_intrinsic("llvm.memcpy", (pointer, pointer, ir.IntType(64)), kind)
        builder.call(
            function,
            (
                builder.inttoptr(destination, pointer),
                builder.inttoptr(source, pointer),
                count,
                ir.Constant(ir.IntType(1), 0),
            ),
        )
        return context.get_dummy_value()

    return types.void(types.uint64, types.uint64, types.uint64), generate


def _has_avx2() -> bool:
    """Whether kernels are compiled for a CPU that has AVX2: what numba was told, else what this machine is."""
    if numba.config.CPU_FEATURES is None:
        return IS_X86 and bool(llvm.get_host_cpu_features().get("avx2"))
    return "+avx2" in numba.config.CPU_FEATURES.split(",")


@intrinsic
def records_at(typing_context, address, count, dtype):
    """The array of `count` elements of a dtype that lies at an address."""
    kind = types.Array(dtype.dtype, 1, "C")

    def generate(context, builder, signature, arguments):
        item = context.get_data_type(kind.dtype)
        item_bytes = context.get_constant(types.intp, context.get_abi_sizeof(item))
        array = make_array(kind)(context, builder)
        data = builder.inttoptr(arguments[0], item.as_pointer())
        populate_array(array, data, [arguments[1]], [item_bytes], item_bytes, None)
        return array._getvalue()

    return kind(types.uint64, types.int64, dtype), generate


@intrinsic
def table_at(typing_context, address, rows, columns):
    """The uint64[rows, columns] that lies at an address."""
    kind = types.Array(types.uint64, 2, "C")

    def generate(context, builder, signature, arguments):
        eight = ir.Constant(ir.IntType(64), 8)
        array = make_array(kind)(context, builder)
        data = builder.inttoptr(arguments[0], ir.IntType(64).as_pointer())
        populate_array(array, data, list(arguments[1:]), [builder.mul(arguments[2], eight), eight], eight, None)
        return array._getvalue()

    return kind(types.uint64, types.int64, types.int64), generate


LINE_BYTES = 64
#: Whether copy_line is two loads and two stores; without AVX2 it is four of each, and libc's memcpy is better then.
LINES_ARE_WIDE = _has_avx2()


@intrinsic
def copy_line(typing_context, destination, source):
    """Copy LINE_BYTES, wherever they lie: all is loaded before anything is stored."""

    def generate(context, builder, signature, arguments):
        half = ir.VectorType(_I8, LINE_BYTES // 2)
        targets, sources = (
            [_pointer_to(half, builder, address, offset) for offset in (0, LINE_BYTES // 2)] for address in arguments
        )
        loaded = [builder.load(pointer, align=1) for pointer in sources]
        for value, pointer in zip(loaded, targets, strict=True):
            builder.store(value, pointer, align=1)
        return context.get_dummy_value()

    return types.void(types.uint64, types.uint64), generate


# libc, by the names and types of its own headers; an address is a uint64, -1 means an error.
libc_read = types.ExternalFunction("read", types.int64(types.int32, types.uint64, types.uint64))
libc_write = types.ExternalFunction("write", types.int64(types.int32, types.uint64, types.uint64))
libc_pread = types.ExternalFunction("pread", types.int64(types.int32, types.uint64, types.uint64, types.int64))
libc_pwrite = types.ExternalFunction("pwrite", types.int64(types.int32, types.uint64, types.uint64, types.int64))
libc_preadv = types.ExternalFunction("preadv", types.int64(types.int32, types.uint64, types.int32, types.int64))
libc_pwritev = types.ExternalFunction("pwritev", types.int64(types.int32, types.uint64, types.int32, types.int64))
libc_preadv2 = types.ExternalFunction(
    "preadv2", types.int64(types.int32, types.uint64, types.int32, types.int64, types.int32)
)
libc_mincore = types.ExternalFunction("mincore", types.int32(types.uint64, types.uint64, types.uint64))
libc_fallocate = types.ExternalFunction("fallocate", types.int32(types.int32, types.int32, types.int64, types.int64))
libc_ioctl = types.ExternalFunction("ioctl", types.int32(types.int32, types.uint64, types.uint64))
libc_fdatasync = types.ExternalFunction("fdatasync", types.int32(types.int32))
libc_poll = types.ExternalFunction("poll", types.int32(types.uint64, types.uint64, types.int32))
libc_sched_yield = types.ExternalFunction("sched_yield", types.int32())
libc_clock_gettime = types.ExternalFunction("clock_gettime", types.int32(types.int32, types.uint64))
libc_epoll_wait = types.ExternalFunction("epoll_wait", types.int32(types.int32, types.uint64, types.int32, types.int32))
#: syscall(2), for calls that libc has no function for: number and six arguments.
libc_syscall = types.ExternalFunction("syscall", types.int64(*[types.int64] * 7))
end_process = types.ExternalFunction("_exit", types.void(types.int32))
_errno_location = types.ExternalFunction("__errno_location", types.uint64())
libc_mmap = types.ExternalFunction(
    "mmap", types.uint64(types.uint64, types.uint64, types.int32, types.int32, types.int32, types.int64)
)


EINTR = 4  # <errno.h>
EAGAIN = 11
EFAULT = 14
EBUSY = 16
EINVAL = 22
EOPNOTSUPP = 95
ECANCELED = 125


@kernel
def last_errno():
    """errno of the libc call that just failed in this thread."""
    return types.int64(load_u32(_errno_location()))


@kernel
def ring_eventfd(fd, word_address):
    """Add 1 to an eventfd; `word_address` points to a 64-bit 1 in this process. True when it was written."""
    return libc_write(fd, word_address, types.uint64(8)) == 8


@kernel
def drain_eventfd(fd, word_address):
    """Reset a non-blocking eventfd; `word_address` points to 8 scratch bytes of this process."""
    return libc_read(fd, word_address, types.uint64(8)) == 8


@kernel
def monotonic_ns(timespec_address):
    """CLOCK_MONOTONIC in nanoseconds; `timespec_address` points to 16 scratch bytes of this process."""
    libc_clock_gettime(types.int32(1), timespec_address)
    return types.int64(load_u64(timespec_address)) * 1_000_000_000 + types.int64(
        load_u64(timespec_address + types.uint64(8))
    )
