"""Look at a model folder before anything heavy reads it: is it complete, safe, and something that can be trained here?

A missing shard, pickled weights or an adapter given as a base are errors with words, not stack traces from inside a
library an hour later. Only headers are parsed; the digest reads the files once.
"""

import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import yaml
from huggingface_hub.repocard import metadata_load
from transformers import CONFIG_MAPPING

from trainer.errors import ModelError, nearest
from trainer.fingerprint import file_digest, tree_digest
from trainer.model.attention import refuse_config
from trainer.samples import BaseModel

WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "merges.txt")
DESCRIBING_FILES = (
    *TOKENIZER_FILES,
    "config.json",
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    WEIGHTS_INDEX,
)
PICKLED = (".bin", ".pt", ".pth", ".ckpt")


def describe_folder(
    folder: Path, *, name: str, revision: str, trust_remote_code: bool, attribution: str = ""
) -> BaseModel:
    """Check that ``folder`` holds a complete causal language model, and describe it.

    Raises:
        ModelError: config, weights or tokenizer missing, damaged, pickled; attention that cannot be packed; own code.
    """
    config = read_config(folder)
    refuse_config(config)
    _check_code(config, folder, trust_remote_code)
    weights = weight_files(folder)
    if not any((folder / file).is_file() for file in TOKENIZER_FILES):
        raise ModelError(
            "a model folder without a tokenizer",
            where=str(folder),
            got=_listing(folder),
            allowed=f"one of {', '.join(TOKENIZER_FILES)}",
            do="copy the tokenizer files of the base model into the folder",
        )
    parameters = sum(count_elements(file) for file in weights)
    describing = [folder / file for file in DESCRIBING_FILES if (folder / file).is_file()]
    return BaseModel(
        name=name,
        directory=str(folder.resolve()),
        revision=revision,
        sha256=tree_digest(sorted([*describing, *weights]), of_file=file_digest),
        license=card_license(folder),
        attribution=attribution,
        parameters=parameters,
    )


def read_config(folder: Path) -> dict[str, Any]:
    """``config.json`` of a model folder.

    Raises:
        ModelError: missing or not JSON; an adapter folder.
    """
    path = folder / "config.json"
    if not path.is_file():
        if (folder / "adapter_config.json").is_file():
            raise ModelError(
                "this folder is an adapter, not a model",
                where=str(folder),
                got=_listing(folder),
                do="set model.path to its base model and method.adapter to this folder",
            )
        raise ModelError(
            "a model folder without config.json",
            where=str(folder),
            got=_listing(folder),
            allowed=f"config.json, {WEIGHTS} and a tokenizer",
            do="point model.path at the folder that save_pretrained wrote",
        )
    try:
        config = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ModelError("the model's config is not JSON", where=str(path), got=error) from error
    if not isinstance(config, dict):
        raise ModelError("the model's config is not a JSON object", where=str(path), got=type(config).__name__)
    return cast(dict[str, Any], config)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder, all of them present.

    Raises:
        ModelError: none, some missing, or only pickled ones.
    """
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    index = folder / WEIGHTS_INDEX
    if not index.is_file():
        pickled = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLED)
        if pickled:
            raise ModelError(
                "the weights are pickled: reading them can run code, so they are not read",
                where=str(folder),
                got=", ".join(pickled),
                allowed="safetensors",
                do="convert them once, in a place you trust: "
                "AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER)",
            )
        raise ModelError(
            "a model folder without weights",
            where=str(folder),
            got=_listing(folder),
            allowed=f"{WEIGHTS}, or {WEIGHTS_INDEX} with its shards",
            do="download or copy the weights into the folder",
        )
    try:
        shards = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ModelError("the index of the weights cannot be read", where=str(index), got=repr(error)) from error
    missing = [shard for shard in shards if not (folder / shard).is_file()]
    if missing:
        raise ModelError(
            f"{len(missing)} of {len(shards)} weight files are missing",
            where=str(folder),
            got=f"no {', '.join(missing[:5])}",
            do="download or copy them into the folder",
        )
    return [folder / shard for shard in shards]


def read_header(file: Path) -> tuple[dict[str, Any], int]:
    """What a safetensors file says of its tensors, {name: {dtype, shape, data_offsets}}, and where their bytes begin.

    Format: a little-endian uint64 length, that many bytes of JSON, the numbers
    (https://github.com/huggingface/safetensors#format).

    Raises:
        ValueError, struct.error: it is no such file, or cut short.
    """
    size = file.stat().st_size
    with file.open("rb") as handle:
        (length,) = struct.unpack("<Q", handle.read(8))
        if length > size:
            raise ValueError(f"header of {length} bytes in a file of {size}")
        header: dict[str, Any] = json.loads(handle.read(length))
    return {name: entry for name, entry in header.items() if name != "__metadata__"}, 8 + length


def count_elements(file: Path) -> int:
    """Number of values in a safetensors file, from its header; also proves that the file is whole.

    Raises:
        ModelError: damaged or cut short.
    """
    try:
        tensors, begin = read_header(file)
        size = file.stat().st_size
        expected = begin + max((int(entry["data_offsets"][1]) for entry in tensors.values()), default=0)
        if expected != size:
            raise ValueError(f"{size} bytes, its header says {expected}")
        return sum(_product(entry["shape"]) for entry in tensors.values())
    except (ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise ModelError(
            "a weight file is damaged or was not downloaded completely (a Git LFS pointer?)",
            where=str(file),
            got=error,
            do="download it again",
        ) from error


def card_license(folder: Path) -> str:
    """The ``license`` of the folder's README.md metadata, "" when it names none."""
    card = folder / "README.md"
    if not card.is_file():
        return ""
    try:
        metadata = metadata_load(card)
    except (ValueError, yaml.YAMLError):  # a README without a metadata block that parses names no licence
        return ""
    return str((metadata or {}).get("license") or "")


def _check_code(config: Mapping[str, Any], folder: Path, trust_remote_code: bool) -> None:
    kinds = sorted(CONFIG_MAPPING.keys())
    known = config.get("model_type") in kinds
    if known and not trust_remote_code:
        return
    if not known and "auto_map" not in config:
        raise ModelError(
            "transformers does not know this kind of model",
            where=str(folder / "config.json"),
            got=f"model_type={config.get('model_type')!r}",
            do=nearest(str(config.get("model_type")), kinds) or "update transformers",
        )
    if not known and not trust_remote_code:
        raise ModelError(
            "this model comes with code of its own, which is not run unless you say so",
            where="model.trust_remote_code",
            got=f"auto_map in {folder / 'config.json'}",
            do="read the code, then set model.trust_remote_code=true (a Hub id also needs model.revision=COMMIT)",
        )


def _listing(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir())
    shown = ", ".join(names[:12]) or "an empty folder"
    return f"{shown}, ... ({len(names)} files)" if len(names) > 12 else shown


def _product(shape: Sequence[int]) -> int:
    result = 1
    for size in shape:
        result *= int(size)
    return result
