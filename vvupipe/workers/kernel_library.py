"""Compiled kernels as a process calls them: an object file from the cache, loaded by LLVM, without numba.

Loading numba takes four times the CPU time of all else that a worker does before it serves, and doubles its memory.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llvmlite.binding as llvm

from kernels.object_symbols import symbol_of
from vvupipe.errors import WorkerError
from vvupipe.workers import kernel_cache


class KernelLibrary:
    """The entries of kernels/NAME_entries.py. It stays loaded as long as the object lives."""

    def __init__(self, name: str) -> None:
        """Load it; compile it first when the cache does not have it. Raises: WorkerError."""
        path = kernel_cache.object_file(name)
        if not path.exists():
            _compile(name, path)
        try:
            code = path.read_bytes()
        except OSError as error:
            raise WorkerError(f"cannot read {path}: {error.strerror}") from error
        self._name = name
        self._functions: dict[tuple[str, int], Callable[..., int]] = {}
        llvm.initialize_native_target()
        llvm.initialize_native_asmprinter()
        machine = llvm.Target.from_triple(llvm.get_process_triple()).create_target_machine(jit=True)
        self._engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine)
        # A file that is there is whole: it was on the disk before it had its name. LLVM does not check it.
        self._engine.add_object_file(llvm.ObjectFileRef.from_data(code))
        self._engine.finalize_object()

    def address(self, entry: str, words: int) -> int:
        """Address of the C function of an entry that takes so many words. Raises: KeyError."""
        address = int(self._engine.get_function_address(symbol_of(entry, words)))
        if not address:
            raise KeyError(f"{self._name} has no entry {entry} of {words} words")
        return address

    def call(self, entry: str, *words: Any) -> int:
        """Call an entry, without the GIL. words: integers of up to 64 bits. Raises: KeyError."""
        key = (entry, len(words))
        if key not in self._functions:
            prototype = ctypes.CFUNCTYPE(ctypes.c_int64, *[ctypes.c_uint64] * len(words))
            self._functions[key] = prototype(self.address(*key))
        return self._functions[key](*(int(word) for word in words))


def _compile(name: str, path: Path) -> None:
    """Have the object file compiled, by one process at a time. Raises: WorkerError."""
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if path.exists():
            return  # by whom we waited for
        module = ("-P", "-m", "vvupipe.workers.kernel_build")
        done = subprocess.run(
            [sys.executable, *module, name, str(path), "--parent", str(os.getpid())],
            env=kernel_cache.environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
        if done.returncode:
            last = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
            raise WorkerError(f"cannot compile the kernels: {last}")
