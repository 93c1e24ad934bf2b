"""On the device: a compact batch becomes ids, shifted labels and positions, in one kernel.

Only the compact layout has to cross to a device, 4 bytes a token instead of 24; this is its other half. What comes out
is what ``reference.expand`` says, to the bit. Nothing here waits for the device.

The one module of this package that needs more than numpy and numba: Triton, which the CUDA builds of torch bring along.
So nothing imports it before there is a device. Tensors are handed in; torch itself is not imported.
"""

from typing import Any, Protocol

import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]

from trainer_kernels.collate import IGNORE
from trainer_kernels.errors import PackingError

BLOCK = 1024
"""Positions of one program of the kernel."""


class DeviceTensor(Protocol):
    """What is asked of a tensor here; torch's have it."""

    @property
    def dtype(self) -> Any:
        """Its type, as text ``torch.int32`` or ``torch.int64``."""
        ...

    def numel(self) -> int:
        """Its number of elements."""
        ...

    def is_contiguous(self) -> bool:
        """Whether its elements stand side by side."""
        ...


def expand(
    tokens: DeviceTensor,
    cu_seqlens: DeviceTensor,
    *,
    input_ids: DeviceTensor,
    labels: DeviceTensor,
    position_ids: DeviceTensor,
) -> None:
    """Write the batch that ``tokens`` and ``cu_seqlens`` stand for, on the current device and stream.

    ``tokens`` int32[T], T >= 1: ``CompactBatch.tokens``. ``cu_seqlens`` int32[k + 1], k >= 1: where segments begin, and
    T; repetitions of T at its end (segments of no tokens, which fill it up to a fixed length) change nothing.
    ``input_ids``, ``labels``, ``position_ids`` int64[T] are written; all are contiguous, of any shape, on one device.

    Raises ``PackingError`` for tensors of another type or size. The contents are not looked at: that would be a wait.
    """
    size = tokens.numel()
    _check("tokens", tokens, "torch.int32", least=1)
    _check("cu_seqlens", cu_seqlens, "torch.int32", least=2)
    for name, written in (("input_ids", input_ids), ("labels", labels), ("position_ids", position_ids)):
        _check(name, written, "torch.int64", least=size, most=size)
    segments = cu_seqlens.numel() - 1
    programs = (-(-size // BLOCK),)
    kernel: Any = _expand  # Triton's way to start a kernel has no types
    kernel[programs](
        tokens,
        cu_seqlens,
        input_ids,
        labels,
        position_ids,
        size,
        segments,
        HALVINGS=segments.bit_length(),
        BLOCK=BLOCK,
        IGNORE=IGNORE,
    )


def _check(name: str, tensor: DeviceTensor, dtype: str, *, least: int, most: int | None = None) -> None:
    count = tensor.numel()
    if str(tensor.dtype) == dtype and tensor.is_contiguous() and least <= count <= (count if most is None else most):
        return
    raise PackingError(
        f"{name} cannot be expanded, or expanded to",
        got=f"{tensor.dtype} of {count} elements{'' if tensor.is_contiguous() else ', not side by side'}",
        allowed=f"{dtype}, {f'at least {least}' if most is None else most} elements side by side",
        do="give the tensors of one compact batch, and room for as many positions",
    )


@triton.jit(do_not_specialize=["segments"])
def _expand(
    tokens,
    cu_seqlens,
    input_ids,
    labels,
    position_ids,
    size,
    segments,
    HALVINGS: tl.constexpr,
    BLOCK: tl.constexpr,
    IGNORE: tl.constexpr,
):
    t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = t < size
    # The segment of t begins at the last boundary that is not behind t. T itself never is, so repetitions do not count.
    low = tl.full([BLOCK], 0, tl.int32)
    high = tl.full([BLOCK], 0, tl.int32) + segments
    for _ in tl.static_range(HALVINGS):  # pyright: ignore[reportGeneralTypeIssues]  (not typed as iterable)
        middle = (low + high) // 2
        begun = tl.load(cu_seqlens + middle, mask=inside, other=0) <= t
        low = tl.where(begun, middle, low)
        high = tl.where(begun, high, middle)
    token = tl.load(tokens + t, mask=inside, other=0)
    following = tl.load(tokens + t + 1, mask=t + 1 < size, other=-1)
    begin = tl.load(cu_seqlens + low, mask=inside, other=0)
    tl.store(input_ids + t, (token & 0x7FFFFFFF).to(tl.int64), mask=inside)
    tl.store(labels + t, tl.where(following >= 0, following, IGNORE).to(tl.int64), mask=inside)
    tl.store(position_ids + t, (t - begin).to(tl.int64), mask=inside)
