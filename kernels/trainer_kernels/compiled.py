"""One way to compile: numba, releasing the GIL, with the machine code kept on disk where that is possible.

numba refuses to define a cached function at all when it finds no folder to write to (a read-only install and no
writable home, usual in containers). Training must not fail for the lack of a cache, so the function is then compiled
in each process, and a warning says so.
"""

import warnings
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar, cast

import numba
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

P = ParamSpec("P")
R = TypeVar("R")


def compiled(function: Callable[P, R]) -> Callable[P, R]:
    """``function`` compiled on its first call; array arguments may be read-only, no Python object is touched.

    numba's cache knows only the file of the function itself. A compiled function may therefore call compiled
    functions of its own file alone, else an edit of the other file would go unnoticed.
    """
    try:
        dispatcher = numba.njit(cache=True, nogil=True)(function)
    except RuntimeError as error:
        if "no locator" not in str(error):
            raise
        warnings.warn(
            "numba found no folder to keep machine code in, so every process compiles the packing functions anew "
            "(some seconds). Set NUMBA_CACHE_DIR to a writable folder.",
            RuntimeWarning,
            stacklevel=1,  # the same text and place for all functions: shown once
        )
        dispatcher = numba.njit(nogil=True)(function)
    return cast(Callable[P, R], dispatcher)


@intrinsic
def prefetch(typing_context: Any, array: Any = None, place: Any = None) -> Any:
    """Within compiled code: ask for the memory at ``array[place]`` without waiting for it. Never faults."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = signature.args[0]
        made = context.make_array(kind)(context, builder, arguments[0])
        place = [arguments[1]]
        address = cgutils.get_item_pointer(context, builder, kind, made, place, wraparound=False, boundscheck=False)
        byte, number = ir.IntType(8).as_pointer(), ir.IntType(32)
        takes = ir.FunctionType(ir.VoidType(), [byte, number, number, number])
        function = cgutils.get_or_insert_function(builder.module, takes, "llvm.prefetch.p0")
        read, keep, data = (ir.Constant(number, value) for value in (0, 3, 1))
        builder.call(function, [builder.bitcast(address, byte), read, keep, data])
        return context.get_dummy_value()

    return types.void(array, types.intp), generate
