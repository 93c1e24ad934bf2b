"""Which number format the model computes in, decided once, and the one context every forward pass runs in.

bfloat16 is the better choice on most GPUs and on CPUs with bf16 instructions, and up to ten times slower on CPUs
without. Nothing but a measurement tells, so ``auto`` measures: the matrix product that dominates this model.

Weights that are trained stay in float32; autocast makes the 16-bit copies a product needs. That is why the context
belongs to every forward pass, of training, evaluation and generation alike.
"""

import time
from contextlib import AbstractContextManager, nullcontext

import torch

from trainer.errors import ModelError, nearest

DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
MARGIN = 1.2
"""bfloat16 has to be this much faster than float32 on a CPU: it costs precision, so a tie goes to float32."""
PROBE_ROWS = 512
PROBE_REPEATS = 5


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype called ``name`` ("float32", "bfloat16", "float16").

    Raises:
        ModelError: no such dtype.
    """
    if name not in DTYPES:
        raise ModelError(
            "unknown dtype", where="model.dtype", got=name, allowed=", ".join(DTYPES), do=nearest(name, list(DTYPES))
        )
    return DTYPES[name]


def compute_context(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[object]:
    """Autocast to ``dtype`` on ``device``; nothing for float32. Enter it around every forward pass of the model."""
    if dtype == torch.float32:
        return nullcontext()
    return torch.autocast(device.type, dtype=dtype)


def resolve_dtype(
    requested: str, device: torch.device, *, hidden_size: int = 576, intermediate_size: int = 1536
) -> tuple[str, str]:
    """The dtype to compute in and why, as (name, reason).

    ``auto``: bfloat16 on a GPU that has it, else float32; on a CPU the faster of the two at the product
    [512, hidden_size] x [hidden_size, intermediate_size], with a margin of 1.2 in favour of float32.

    Raises:
        ModelError: unknown name, or a dtype that this device cannot train in.
    """
    if requested != "auto":
        _refuse_unsupported(torch_dtype(requested), device)
        return requested, "as configured"
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "bfloat16", f"{torch.cuda.get_device_name(device)} computes in bfloat16"
        return "float32", f"{torch.cuda.get_device_name(device)} has no bfloat16"
    slow = _matmul_seconds(torch.float32, hidden_size, intermediate_size)
    fast = _matmul_seconds(torch.bfloat16, hidden_size, intermediate_size)
    return choose_cpu_dtype(float32_seconds=slow, bfloat16_seconds=fast, shape=(hidden_size, intermediate_size))


def choose_cpu_dtype(*, float32_seconds: float, bfloat16_seconds: float, shape: tuple[int, int]) -> tuple[str, str]:
    """The decision of ``auto`` on a CPU, out of two measured times of the same product: (name, reason)."""
    name = "bfloat16" if float32_seconds > MARGIN * bfloat16_seconds else "float32"
    gflop = 2 * PROBE_ROWS * shape[0] * shape[1] / 1e9
    return name, (
        f"measured on this CPU at {PROBE_ROWS} x {shape[0]} x {shape[1]}: float32 {gflop / float32_seconds:.0f}, "
        f"bfloat16 {gflop / bfloat16_seconds:.0f} GFLOP/s (bfloat16 is taken when {MARGIN} times faster)"
    )


def _refuse_unsupported(dtype: torch.dtype, device: torch.device) -> None:
    if device.type == "cpu" and dtype == torch.float16:
        raise ModelError(
            "float16 is not offered on a CPU",
            where="model.dtype",
            got="float16",
            allowed="float32, bfloat16, auto",
            do="set model.dtype=auto: it measures which of the two is faster here",
        )
    if (
        device.type == "cuda"
        and dtype == torch.bfloat16
        and not torch.cuda.is_bf16_supported(including_emulation=False)
    ):
        raise ModelError(
            f"{torch.cuda.get_device_name(device)} has no bfloat16",
            where="model.dtype",
            got="bfloat16",
            allowed="float32, float16, auto",
            do="set model.dtype=auto",
        )


def _matmul_seconds(dtype: torch.dtype, hidden_size: int, intermediate_size: int) -> float:
    """Best of a few timings of one product in ``dtype``; the first, which sets the library up, is thrown away."""
    left = torch.ones(PROBE_ROWS, hidden_size, dtype=dtype)
    right = torch.ones(intermediate_size, hidden_size, dtype=dtype)
    best = float("inf")
    for repeat in range(PROBE_REPEATS + 1):
        start = time.perf_counter()
        torch.nn.functional.linear(left, right)
        if repeat:
            best = min(best, time.perf_counter() - start)
    return best
