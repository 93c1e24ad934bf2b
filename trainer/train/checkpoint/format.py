"""What a checkpoint is on disk, and whether one is still what was published. Nothing here writes.

A checkpoint is a folder ``step-00000012``:

    rank{r}.safetensors   the fragments rank r owns: ``param:NAME``, ``exp_avg:NAME``, ``exp_avg_sq:NAME``, flat, fp32
    rank{r}.json          per fragment: where it starts, the parameter's shape and count of optimizer steps
    manifest.json         step, identity of the run, base model, guards, sizes and sha256 of all files; its own digest

No pickle is written or read. No random state is stored, because none exists between two micro-batches (``seed_all``):
the noise of a micro-batch follows from seed, step and documents.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from trainer.errors import TrimtabError
from trainer.fingerprint import digest, file_digest
from trainer.train.state import TrainState

FORMAT = 2
_NAME = re.compile(r"step-(\d{8})")
_RANK_FILE = re.compile(r"rank\d+\.(safetensors|json)")


class DamagedCheckpoint(TrimtabError):
    """A checkpoint folder that is not what was published."""


class OtherFormat(DamagedCheckpoint):
    """A checkpoint that another version wrote: nothing says that it is damaged, only this version cannot read it."""


@dataclass(frozen=True, slots=True)
class FileInfo:
    """Size in bytes and sha256 of one file."""

    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """``manifest.json``. ``base``: sha256 of the base model. ``shapes``: of all trainable parameters, by name.

    ``sha256``: digest of this manifest with the field empty.
    """

    format: int
    step: int
    identity: str
    base: str
    world_size: int
    state: TrainState
    shapes: dict[str, tuple[int, ...]]
    files: dict[str, FileInfo]
    sha256: str = ""


@dataclass(frozen=True, slots=True)
class FragmentInfo:
    """One fragment in ``rank{r}.json``; ``step`` is the parameter's own count of optimizer steps."""

    start: int
    length: int
    shape: tuple[int, ...]
    step: float


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A folder that was verified."""

    path: Path
    manifest: Manifest


def checkpoint_path(directory: Path, step: int) -> Path:
    """Where the checkpoint after ``step`` optimizer steps lies."""
    return directory / f"step-{step:08d}"


def published(directory: Path) -> list[Path]:
    """Published checkpoints, newest first, verified or not."""
    if not directory.is_dir():
        return []
    found = [path for path in directory.iterdir() if _NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=lambda path: path.name, reverse=True)


def verify(path: Path, *, contents: bool = True) -> Manifest:
    """Compare a published checkpoint with its manifest: every byte, or without ``contents`` names and sizes alone.

    Raises:
        OtherFormat: another version wrote it.
        DamagedCheckpoint: a file is missing, cut, changed or unreadable; the message names it.
    """
    manifest = read_manifest(path)
    for name, info in manifest.files.items():
        file = path / name
        if not _RANK_FILE.fullmatch(name) or file.is_symlink() or not file.is_file():
            raise damage(path, f"{name} is missing")
        size = file.stat().st_size
        if size != info.bytes:
            raise damage(path, f"{name} has {size} of {info.bytes} bytes")
        if contents and _read_digest(path, file) != info.sha256:
            raise damage(path, f"{name} has other contents than were written")
    return manifest


def read_manifest(path: Path) -> Manifest:
    """The manifest of a published checkpoint; the files it lists are not looked at.

    Raises:
        OtherFormat: another version wrote it.
        DamagedCheckpoint: it is missing, changed or of another step.
    """
    for part, what in ((path, "it"), (path / "manifest.json", "manifest.json")):
        if part.is_symlink():
            raise damage(path, f"{what} is a link to another place")
    try:
        raw = (path / "manifest.json").read_bytes()
        found = msgspec.json.decode(raw, type=_Format).format
        if found != FORMAT:
            raise OtherFormat(
                "checkpoint of another version",
                where=str(path),
                got=f"format {found}, and this version reads {FORMAT}",
                do="it is not used and not deleted; the version that wrote it can read it",
            )
        manifest = msgspec.json.decode(raw, type=Manifest)
    except OSError as fault:
        raise damage(path, f"manifest.json cannot be read ({fault.strerror})") from fault
    except msgspec.DecodeError as fault:
        raise damage(path, f"manifest.json cannot be understood ({fault})") from fault
    if manifest.sha256 != digest(replace(manifest, sha256="")):
        raise damage(path, "manifest.json has other contents than were written")
    if checkpoint_path(path.parent, manifest.step) != path:
        raise damage(path, f"manifest.json is of step {manifest.step}")
    return manifest


def _read_digest(path: Path, file: Path) -> str:
    try:
        return file_digest(file)
    except OSError as fault:
        raise damage(path, f"{file.name} cannot be read ({fault.strerror})") from fault


def read_index(path: Path) -> Mapping[str, FragmentInfo]:
    """``rank{r}.json``: the stored fragments of one rank by the name of their parameter."""
    return msgspec.json.decode(path.read_bytes(), type=dict[str, FragmentInfo])


def damage(path: Path, what: str) -> DamagedCheckpoint:
    """The error of a checkpoint in which ``what`` was found."""
    return DamagedCheckpoint("damaged checkpoint", where=str(path), got=what, do="it is not used and not deleted")


class _Format(msgspec.Struct):
    format: int
