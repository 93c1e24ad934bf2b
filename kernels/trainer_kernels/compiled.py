"""One way to compile: numba, releasing the GIL, with the machine code kept on disk where that is possible.

numba refuses to define a cached function at all when it finds no folder to write to (a read-only install and no
writable home, usual in containers). Training must not fail for the lack of a cache, so the function is then compiled
in each process, and a warning says so.
"""

import warnings
from collections.abc import Callable
from typing import ParamSpec, TypeVar, cast

import numba

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
