"""Checks of arguments that several modules make: the same words for the same mistake."""

from operator import index

import numpy as np
from numpy.typing import NDArray

from trainer_kernels.errors import PackingError


def whole(name: str, value: int, least: int, most: int) -> int:
    """``value`` as a Python int within ``[least, most]``; numpy's integers will do, floats will not."""
    try:
        number = index(value)
    except TypeError:
        number = None
    if number is None or not least <= number <= most:
        raise PackingError(
            f"{name} is out of range",
            got=repr(value),
            allowed=f"a whole number from {least} to {most}",
            do=f"give another {name}",
        )
    return number


def whole_numbers(name: str, values: object, least: int | None) -> NDArray[np.integer]:
    """``values`` as a one-dimensional integer array with no element below ``least``, if that is given."""
    array = np.asarray(values)
    if array.ndim != 1 or (array.dtype.kind not in "iu" and len(array)):
        raise PackingError(
            f"{name} must be one whole number per document",
            got=f"{array.dtype} of shape {array.shape}",
            allowed="a one-dimensional integer array",
            do="take it from the arena",
        )
    if least is not None and len(array) and int(array.min()) < least:
        refuse_documents(
            f"{name} below {least}", array, array < least, f"at least {least}", "leave these documents out"
        )
    return array


def refuse_documents(what: str, values: NDArray[np.integer], wrong: NDArray[np.bool_], allowed: str, do: str) -> None:
    """Raise ``PackingError`` that counts the documents in ``wrong`` and names the first few with their values."""
    ids = np.flatnonzero(wrong)
    first = ", ".join(f"document {i} with {int(values[i])}" for i in ids[:5])
    more = ", ..." if len(ids) > 5 else ""
    raise PackingError(what, got=f"{len(ids)} of {len(values)}: {first}{more}", allowed=allowed, do=do)
