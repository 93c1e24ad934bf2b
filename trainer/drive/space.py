"""Whether the disk can hold what the run will write, found out before a GPU is touched rather than at the export."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec

from trainer.console import gigabytes
from trainer.errors import RunError
from trainer.host_memory import STATE_BYTES

USUAL_WIDTH = 1024
HEADROOM = 1.05
"""Tokenizers, manifests, logs, predictions."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _TextWidths:
    hidden_size: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Widths:
    hidden_size: int | None = None
    n_embd: int | None = None
    d_model: int | None = None
    text_config: _TextWidths | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """Bytes that will be written: all checkpoints that exist at one time, and the exported models."""

    checkpoints: int
    export: int

    @property
    def total(self) -> int:
        """All of it, with headroom."""
        return int((self.checkpoints + self.export) * HEADROOM)


def bytes_needed(
    *, weight_bytes: int, trainable: int, keep: int, trains: bool, exports_adapter: bool, exports_merged: bool
) -> Need:
    """What is still to be written.

    ``weight_bytes``: of the base model's weight files, which a merged export repeats; ``trainable``: parameters that
    are trained; ``keep``: newest checkpoints that are kept, to which the best one and the one being written come;
    ``trains``: checkpoints will be written.
    """
    checkpoint = trainable * STATE_BYTES
    export = (weight_bytes if exports_merged else 0) + (trainable * 4 if exports_adapter else 0)
    return Need(checkpoints=(keep + 2) * checkpoint if trains else 0, export=export)


def weight_bytes(model: Path) -> int:
    """Size of the weight files in a model folder, in bytes."""
    return sum(file.stat().st_size for file in model.glob("*.safetensors"))


def trained_parameters(parameters: int, *, rank: int | None, width: int) -> int:
    """About how many of a model's ``parameters`` are trained, where its shape is not known in detail.

    All (``rank`` None), or those of a LoRA of this rank.

    An adapter of rank r on a matrix of in x out has r (in + out) parameters: 2 r / width of a square one. Embeddings
    are counted as if they had one too, which makes up for matrices narrower than ``width``.
    """
    return parameters if rank is None else min(parameters, 2 * rank * parameters // width)


def model_width(model: Path) -> int:
    """Hidden size that a model folder's config.json states under one of its usual names; 1024 when under none."""
    try:
        stated = msgspec.json.decode((model / "config.json").read_bytes(), type=_Widths)
    except (OSError, msgspec.DecodeError):
        return USUAL_WIDTH
    inner = stated.text_config.hidden_size if stated.text_config is not None else None
    return stated.hidden_size or stated.n_embd or stated.d_model or inner or USUAL_WIDTH


def require_space(folder: Path, need: Need, *, free_bytes: Callable[[Path], int] | None = None) -> None:
    """Refuse when the file system of ``folder`` has less free than ``need``.

    Raises:
        RunError: with both numbers.
    """
    free = (free_bytes or _free)(folder)
    if free >= need.total:
        return
    raise RunError(
        "no space for the export" if free < need.export else "no space for the checkpoints and the export",
        where=str(folder),
        got=f"{gigabytes(free)} free",
        allowed=f"at least {gigabytes(need.total)}: checkpoints {gigabytes(need.checkpoints)}, "
        f"export {gigabytes(need.export)}",
        do="free some space, set run.root (or run.dir) to another disk, or write less: checkpoint.keep=1, "
        "export.merged=false",
    )


def _free(folder: Path) -> int:
    return shutil.disk_usage(folder).free
