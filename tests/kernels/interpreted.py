"""Kernels run by the Python interpreter, one load and store at a time, with somebody watching each of them.

The very functions that numba compiles (`py_func`), with kernels.memory replaced: a death after any store, or a driver
that writes between any two loads, comes about by raising or writing in the watcher.
"""

import ctypes
import types

import numba
import numpy as np

from kernels import memory

_WIDTHS = {
    name: (int(name.rsplit("u", 1)[1]), name.startswith("load"))
    for name in dir(memory)
    if name.startswith(("load_", "store_")) and name.rsplit("u", 1)[1].isdigit()
}
_C_TYPES = {8: ctypes.c_uint8, 16: ctypes.c_uint16, 32: ctypes.c_uint32, 64: ctypes.c_uint64}
_KINDS = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}


class Interpreter:
    """on_store(address, bytes) is called after each store, on_load(address, bytes) after each load."""

    def __init__(self, on_store=None, on_load=None):
        self.on_store = on_store or (lambda address, count: None)
        self.on_load = on_load or (lambda address, count: None)
        self._modules = {}
        self._functions = {}

    def module(self, real):
        """A namespace with the functions of a module of kernels/."""
        if real.__name__ not in self._modules:
            names = self._modules[real.__name__] = {}
            for name, value in vars(real).items():
                names[name] = self._replaced(value, name)
        return types.SimpleNamespace(**self._modules[real.__name__])

    def _replaced(self, value, name):
        if isinstance(value, numba.core.dispatcher.Dispatcher):
            return self._function(value.py_func)
        if isinstance(value, types.ModuleType) and value.__name__.startswith("kernels."):
            return self.module(value)
        if isinstance(value, numba.types.Integer):
            return _cast(value)
        if name in _WIDTHS and value is getattr(memory, name):
            return self._access(*_WIDTHS[name])
        if name == "full_fence":
            return lambda: None
        if name.startswith("prefetch"):
            return lambda address: None
        return value

    def _function(self, real):
        """Its globals are filled in when it is first called: modules may import one another in any order."""

        def call(*arguments):
            if real not in self._functions:
                module = __import__(real.__module__, fromlist=["_"])
                self.module(module)
                self._functions[real] = types.FunctionType(real.__code__, self._modules[real.__module__])
            return self._functions[real](*arguments)

        return call

    def _access(self, bits, loads):
        c_type, kind = _C_TYPES[bits], _KINDS[bits]

        def load(address):
            value = kind(c_type.from_address(int(address)).value)
            self.on_load(int(address), bits // 8)
            return value

        def store(address, value):
            c_type.from_address(int(address)).value = int(value)
            self.on_store(int(address), bits // 8)

        return load if loads else store


class Records:
    """An array of records, as `Fields` each."""

    def __init__(self, array):
        self._array = array

    def __getitem__(self, index):
        return Fields(self._array[index])


class Fields:
    """A record whose fields are attributes, as numba has them (numpy.record has some of its own, such as `size`)."""

    def __init__(self, record):
        object.__setattr__(self, "_held", record)

    def __getattr__(self, name):
        return self._held[name]

    def __setattr__(self, name, value):
        self._held[name] = value


def _cast(kind):
    mask, numpy_kind = (1 << kind.bitwidth) - 1, np.dtype(str(kind)).type

    def cast(value):
        value = int(value) & mask
        return numpy_kind(value - mask - 1 if kind.signed and value >> kind.bitwidth - 1 else value)

    return cast
