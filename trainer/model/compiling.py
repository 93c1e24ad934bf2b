"""Decoder layers through torch.compile: one at a time, so that compiling takes seconds and not minutes.

All layers of a model are the same code, and packs have static shapes where it is compiled, so a layer is compiled once
and serves all. What varies between micro-batches (embedding, loss over the learnt positions) stays outside. Generation
has other shapes at every token: it runs the same layers uncompiled, see ``without_compiling``.
"""

import os
import stat
from contextlib import AbstractContextManager
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import nn

from trainer.errors import ModelError
from trainer.model.adapters import decoder_layer_modules, inner_model
from trainer_launch.room import C_COMPILERS, has_c_compiler

VARIANTS = 32
"""A layer is compiled again for layers with and without adapters, with and without gradients, in training and
evaluation; after 8, torch's own limit, it would quietly stop compiling."""


def compile_layers(model: nn.Module) -> int:
    """Compile the decoder layers of ``model`` in place, at their first call; returns their number.

    Raises:
        ModelError: others may write where the compiled code would be kept.
    """
    from torch._inductor.runtime.cache_dir_utils import cache_dir  # 1.6 s, which only who compiles has to spend

    require_own(Path(cache_dir()))
    layers = decoder_layer_modules(inner_model(model))
    torch._dynamo.config.recompile_limit = max(VARIANTS, torch._dynamo.config.recompile_limit)
    for layer in layers:
        layer.compile()
    return len(layers)


def require_own(folder: Path) -> None:
    """Refuse a cache of compiled code that others may write into: torch loads code out of it.

    Its usual place is in the system's temporary folder, under a name that everybody knows and may have taken before.

    Raises:
        ModelError: folder or link belong to another user, or everybody may write.
    """
    found = folder.stat()
    if {found.st_uid, folder.lstat().st_uid} != {os.geteuid()} or found.st_mode & stat.S_IWOTH:
        raise ModelError(
            "others may write into the folder that torch.compile loads code from",
            where=str(folder),
            got=f"owner {found.st_uid}, mode {stat.filemode(found.st_mode)}",
            allowed=f"a folder of user {os.geteuid()} that others cannot write into",
            do="set TORCHINDUCTOR_CACHE_DIR to a folder of yours, or model.compile=false",
        )


def cannot_compile(device: torch.device, strategy: str, *, quantised: bool = False) -> str | None:
    """Why torch.compile has no chance on ``device`` under ``strategy``, in words; None where it has."""
    if quantised:
        return "it was not tried with a base in 4 bits"
    if strategy == "zero3":
        return "zero3 gathers the weights of a layer piece by piece while it runs"
    if device.type == "cuda" and find_spec("triton") is None:
        return "the package triton is not installed"
    if not has_c_compiler():
        return f"there is no C compiler ({', '.join(C_COMPILERS)})"
    return None


def should_compile(
    wanted: bool | None, device: torch.device, strategy: str, *, quantised: bool = False
) -> tuple[bool, str]:
    """Whether to compile, and why, in words. ``wanted`` None: on a GPU, if it can be done and the base has 16 bits.

    Raises:
        ModelError: wanted, and impossible here.
    """
    missing = cannot_compile(device, strategy, quantised=quantised)
    if wanted and missing:
        raise ModelError(
            "the layers cannot be compiled",
            where="model.compile",
            got=missing,
            do="set model.compile=false, or install what is missing",
        )
    if wanted is not None:
        return wanted, "as configured"
    if device.type != "cuda":
        return False, "only on GPUs, unless model.compile=true"
    return (False, missing) if missing else (True, "the default on GPUs")


def without_compiling() -> AbstractContextManager[None]:
    """Compiled layers run as they were written: for generation and whatever else has shapes of its own."""
    return torch.compiler.set_stance("force_eager")
