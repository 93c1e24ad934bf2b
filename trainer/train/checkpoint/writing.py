"""The one place where the bytes of a checkpoint go to disk: written once, hashed on the way, durable on return.

Tensors are written in the format of safetensors without that library: it would neither hash on the way nor take a GPU's
tensors one by one, and a save beside the training must not hold the interpreter's lock. Writing and hashing release it.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch

from trainer.train.checkpoint.format import FileInfo

CHUNK = 8 << 20
"""Bytes that are hashed and written at a time."""
_DTYPES = {torch.float32: "F32"}


class PoisonedValue(ValueError):
    """A value that is not finite, in a tensor that was to be saved."""


def write_durably(path: Path, pieces: Iterable[bytes | memoryview]) -> FileInfo:
    """Write a new file out of ``pieces`` and sync it; the user's umask decides who may read it.

    Raises:
        OSError: it exists, or cannot be written; what was written so far stays.
    """
    sha256, size = hashlib.sha256(), 0
    with path.open("xb", buffering=0) as handle:
        for piece in pieces:
            sha256.update(piece)
            rest = memoryview(piece)
            while rest:
                written = handle.write(rest)
                rest, size = rest[written:], size + written
        os.fsync(handle.fileno())
    return FileInfo(size, sha256.hexdigest())


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> FileInfo:
    """Write flat float32 ``tensors`` by name as a safetensors file; those of a GPU are fetched one at a time.

    Raises:
        OSError: as in ``write_durably``.
        PoisonedValue: a value is not finite; the message names its tensor.
    """
    return write_durably(path, _safetensors(tensors))


def _safetensors(tensors: Mapping[str, torch.Tensor]) -> Iterator[bytes | memoryview]:
    header: dict[str, object] = {}
    offset = 0
    for name, tensor in tensors.items():
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": [tensor.numel()], "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of eight
    yield len(text).to_bytes(8, "little") + text
    for name, tensor in tensors.items():
        values = tensor.detach().cpu().contiguous().numpy()
        for start in range(0, values.size, CHUNK // 4):
            chunk = values[start : start + CHUNK // 4]
            lowest, highest = float(chunk.min()), float(chunk.max())  # a NaN anywhere comes out of both
            if not (abs(lowest) < float("inf") and abs(highest) < float("inf")):
                raise PoisonedValue(f"{name} has a value that is not finite")
            yield chunk.data.cast("B")
