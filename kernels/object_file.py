"""Kernels as an object file: a process that loads one needs neither numba nor the time that numba takes to load.

A module of entries (`*_entries.py`) has functions of 64-bit words, compiled here with all that they call. Each
becomes a C function of uint64_t that returns int64_t, with a symbol that tells how many words it takes.
"""

import ctypes
import inspect
from types import ModuleType

import llvmlite.binding as llvm
import numba
from llvmlite import ir
from numba import types

from kernels.jit import OPTIONS
from kernels.object_symbols import symbol_of

_WORD = ir.IntType(64)
_POINTER = ir.IntType(8).as_pointer()


def _compile(function, words):
    """(LLVM module with the function and what it calls, name of the function there)."""
    signature = types.int64(*[types.uint64] * words)
    # Without wrappers for the interpreter nothing refers to it, or to numba's run-time.
    options = {**OPTIONS, "_nrt": False, "no_cpython_wrapper": True, "no_cfunc_wrapper": True}
    compiled = numba.njit([signature], **options)(function).overloads[signature.args]
    return llvm.parse_assembly(compiled.library.get_llvm_str()), compiled.fndesc.llvm_func_name


def _c_function(module, symbol, native, words):
    """Source of the C function that calls a function as numba has it: result and exception by address, then words."""
    source = ir.Module(symbol)
    source.triple, source.data_layout = module.triple, module.data_layout
    native_type = ir.FunctionType(ir.IntType(32), [_WORD.as_pointer(), _POINTER.as_pointer(), *[_WORD] * words])
    callee = ir.Function(source, native_type, native)
    function = ir.Function(source, ir.FunctionType(_WORD, [_WORD] * words), symbol)
    builder = ir.IRBuilder(function.append_basic_block())
    result, exception = builder.alloca(_WORD), builder.alloca(_POINTER)
    status = builder.call(callee, [result, exception, *function.args])
    # No kernel raises; one that did must not go on, and its worker is replaced.
    with builder.if_then(builder.icmp_signed("!=", status, ir.Constant(status.type, 0)), likely=False):
        trap = ir.Function(source, ir.FunctionType(ir.VoidType(), []), "llvm.trap")
        builder.call(trap, [])
    builder.ret(builder.load(result))
    return str(source)


def _check(module):
    """Nothing is called that the process that loads it may lack. Raises: ValueError."""
    libc = ctypes.CDLL(None)
    for function in module.functions:
        name = function.name
        if function.is_declaration and not name.startswith("llvm.") and not hasattr(libc, name):
            raise ValueError(f"a kernel calls {name}, which is not in libc")


def _target_machine():
    """For the CPU that numba compiles for."""
    cpu, features = numba.config.CPU_NAME, numba.config.CPU_FEATURES
    return llvm.Target.from_triple(llvm.get_process_triple()).create_target_machine(
        cpu=llvm.get_host_cpu_name() if cpu is None else cpu,
        features=llvm.get_host_cpu_features().flatten() if features is None else features,
        opt=3,
        codemodel="jitdefault",
        jit=True,
    )


def build(entries: ModuleType) -> bytes:
    """The object file of a module's ENTRIES. Raises: ValueError when they call what is not in libc."""
    whole = None
    for function in entries.ENTRIES:
        words = len(inspect.signature(function).parameters)
        module, native = _compile(function, words)
        module.link_in(llvm.parse_assembly(_c_function(module, symbol_of(function.__name__, words), native, words)))
        if whole is None:
            whole = module
        else:
            whole.link_in(module)
    assert whole is not None
    whole.verify()
    _check(whole)
    return _target_machine().emit_object(whole)
