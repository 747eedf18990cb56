"""Kernels as C functions in an object file, called without numba by whoever loads it."""

import ctypes
import signal
import subprocess
import sys
from types import SimpleNamespace

import llvmlite.binding as llvm
import pytest
from numba import int64, types, uint64

from kernels import object_file
from kernels.memory import records_at, store_u64, table_at
from kernels.object_symbols import symbol_of
from kernels.ring_record import RING


def difference(left, right):
    return int64(left) - int64(right)


def fill(rows, count):
    table = table_at(rows, int64(count), int64(2))
    for k in range(count):
        table[k, 0] = uint64(k)
        table[k, 1] = uint64(100 + k)
    return 0


def name_ring(rings, index):
    records_at(rings, int64(index + uint64(1)), RING)[index].index = int64(index)
    return 0


def store_twice(address):
    store_u64(address, uint64(7))
    store_u64(address + uint64(8), uint64(8))
    return 0


def fail(word):
    if word:
        raise ValueError
    return 0


_nowhere = types.ExternalFunction("vvupipe_is_not_in_libc", types.int64())


def call_nowhere():
    return _nowhere()


def elsewhere(code):
    """Run a line of Python in another process; `t` is this module."""
    line = f"from tests.kernels import test_object_file as t; {code}"
    return subprocess.run([sys.executable, "-c", line], check=False, timeout=50, capture_output=True, text=True)


def load(*functions):
    """Engine that has them, which must be kept."""
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    machine = llvm.Target.from_triple(llvm.get_process_triple()).create_target_machine(jit=True)
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine)
    code = object_file.build(SimpleNamespace(ENTRIES=functions))
    engine.add_object_file(llvm.ObjectFileRef.from_data(code))
    engine.finalize_object()
    return engine


def function(engine, name, words):
    address = engine.get_function_address(symbol_of(name, words))
    return ctypes.CFUNCTYPE(ctypes.c_int64, *[ctypes.c_uint64] * words)(address)


@pytest.fixture(scope="module")
def engine():
    return load(difference, fill, name_ring, store_twice, fail)


def test_words_are_64_bits_wide_and_results_are_signed(engine):
    call = function(engine, "difference", 2)
    assert call(3, 5) == -2
    assert call(-1, 0) == -1
    assert call(1 << 62, 1) == (1 << 62) - 1


def test_memory_of_the_caller_is_what_it_says(engine):
    words = (ctypes.c_uint64 * 6)()
    function(engine, "fill", 2)(ctypes.addressof(words), 3)
    assert list(words) == [0, 100, 1, 101, 2, 102]
    function(engine, "store_twice", 1)(ctypes.addressof(words) + 16)
    assert list(words) == [0, 100, 7, 8, 2, 102]


def test_records_have_their_layout(engine):
    rings = ctypes.create_string_buffer(3 * RING.itemsize)
    function(engine, "name_ring", 2)(ctypes.addressof(rings), 2)
    offset = 2 * RING.itemsize + RING.fields["index"][1]
    assert int.from_bytes(rings.raw[offset : offset + 8], "little") == 2
    assert not any(rings.raw[:offset])


def test_a_kernel_that_raises_ends_its_process(engine):
    assert function(engine, "fail", 1)(0) == 0
    done = elsewhere("engine = t.load(t.fail); t.function(engine, 'fail', 1)(1)")
    assert done.returncode in (-signal.SIGILL, -signal.SIGTRAP)


def test_what_is_not_in_libc_cannot_be_called():
    # Not here: numba keeps what it compiled, and would end the process when it compiles something else.
    done = elsewhere("t.load(t.call_nowhere)")
    assert done.returncode == 1
    assert "ValueError: a kernel calls vvupipe_is_not_in_libc" in done.stderr
