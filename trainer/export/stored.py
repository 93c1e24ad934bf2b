"""What lies in the safetensors files of a model folder, read by header or one tensor at a time.

A module of its own, so that the process that verifies an export shares with the one that wrote it no more than this.
"""

from pathlib import Path

import torch
from safetensors import safe_open

from trainer.errors import ModelError

WEIGHT_FILES = "*.safetensors"


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of ``folder``, by name."""
    return sorted(folder.glob(WEIGHT_FILES))


def tensor_files(folder: Path) -> dict[str, Path]:
    """Name of every tensor in ``folder`` to the file it is in."""
    places: dict[str, Path] = {}
    for file in weight_files(folder):
        with safe_open(file, framework="pt") as opened:
            places.update(dict.fromkeys(opened.keys(), file))
    return places


def read_tensor(file: Path, name: str) -> torch.Tensor:
    """One tensor, on the CPU, as it is stored."""
    with safe_open(file, framework="pt") as opened:
        return opened.get_tensor(name)


def shapes_on_disk(folder: Path) -> dict[str, tuple[int, ...]]:
    """Name to shape of every tensor in the safetensors files of ``folder``; only headers are read.

    Raises:
        ModelError: there are none.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for file in weight_files(folder):
        with safe_open(file, framework="pt") as opened:
            names = list(opened.keys())
            shapes.update({name: tuple(opened.get_slice(name).get_shape()) for name in names})
    if not shapes:
        raise ModelError(
            "no weights to compare with",
            where=str(folder),
            got="no safetensors file",
            allowed="model*.safetensors",
            do="give a base model whose weights are stored as safetensors",
        )
    return shapes
