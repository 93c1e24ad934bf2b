"""From what the user wrote in ``model.path`` to a checked folder, and from the folder to a model ready to train.

The folder is looked at before anything heavy is imported or read: a missing shard, pickled weights or an adapter given
as a base are errors with words, not stack traces from inside a library. What was used is described by one digest over
config, weights and tokenizer, whatever the name behind it was.
"""

import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
import yaml
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.repocard import metadata_load
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from trainer.console import say
from trainer.errors import ModelError, nearest
from trainer.fingerprint import file_digest, tree_digest
from trainer.model import builtin
from trainer.model.attention import IMPLEMENTATION, refuse_config, register
from trainer.model.precision import resolve_dtype as resolve_dtype
from trainer.model.quiet import without_progress_bars
from trainer.samples import BaseModel

BUILTIN_PREFIX = "builtin:"
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
HUB_PATTERNS = [*DESCRIBING_FILES, "*.safetensors", "*.jinja", "README.md", "LICENSE*", "NOTICE*"]


def resolve_base(
    path: str,
    *,
    revision: str | None,
    cache: Path,
    trust_remote_code: bool,
    tiny_texts: Sequence[str] = (),
    seed: int = 0,
) -> BaseModel:
    """The base model named by ``path``: a folder, a Hub id, ``builtin:smollm2-135m-instruct`` or ``builtin:tiny``.

    ``cache`` is where converted built-in models are kept; Hub models stay in the Hub's own cache. ``tiny_texts`` and
    ``seed`` make ``builtin:tiny``. A download, a conversion and a fallback to a cache are printed.

    Raises:
        ModelError: nothing there, incomplete, pickled, with code of its own, or not reachable.
        UserError: the package of a built-in model is not installed.
    """
    if path.startswith(BUILTIN_PREFIX):
        return _resolve_builtin(path, revision, cache, tiny_texts, seed)
    folder = Path(path).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise ModelError(
                "a folder has no revisions",
                where="model.revision",
                got=f"model.path={path}, model.revision={revision}",
                do="leave model.revision unset, or give a Hub id in model.path",
            )
        return describe_folder(folder, name=folder.resolve().name, revision="", trust_remote_code=trust_remote_code)
    if looks_like_path(path):
        raise _missing_folder(path, folder)
    if trust_remote_code and revision is None:
        raise ModelError(
            "code from the Hub is only run from a pinned revision",
            where="model.revision",
            got="null",
            do="set model.revision to the commit you have read, or model.trust_remote_code=false",
        )
    directory, commit = fetch_from_hub(path, revision, trust_remote_code=trust_remote_code)
    return describe_folder(directory, name=path, revision=commit, trust_remote_code=trust_remote_code)


def looks_like_path(path: str) -> bool:
    """Whether ``path`` can only be meant as a folder: absolute, ``./``, ``~`` or more than one slash."""
    return path.startswith(("/", ".", "~")) or path.count("/") > 1 or path.endswith("/")


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


def count_elements(file: Path) -> int:
    """Number of values in a safetensors file, from its header; also proves that the file is whole.

    Format: 8 bytes little-endian header length, JSON header {name: {shape, data_offsets}}, data.

    Raises:
        ModelError: damaged or cut short.
    """
    size = file.stat().st_size
    try:
        with file.open("rb") as handle:
            (length,) = struct.unpack("<Q", handle.read(8))
            if length > size:
                raise ValueError(f"header of {length} bytes in a file of {size}")
            header: dict[str, Any] = json.loads(handle.read(length))
        tensors = [entry for name, entry in header.items() if name != "__metadata__"]
        expected = 8 + length + max((int(entry["data_offsets"][1]) for entry in tensors), default=0)
        if expected != size:
            raise ValueError(f"{size} bytes, its header says {expected}")
        return sum(_product(entry["shape"]) for entry in tensors)
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


def fetch_from_hub(name: str, revision: str | None, *, trust_remote_code: bool) -> tuple[Path, str]:
    """Download (or find in the Hub's cache) the model ``name``: its folder and the commit it was resolved to.

    The commit is resolved first and then asked for, so that a branch that moves in between cannot mix two versions.

    Raises:
        ModelError: not a Hub id, not found, gated, or not reachable and not cached.
    """
    patterns = [*HUB_PATTERNS, "*.py"] if trust_remote_code else HUB_PATTERNS
    try:
        commit = str(HfApi().model_info(name, revision=revision).sha)
        say(f"base model {name} at {commit[:12]} from the Hub")
        return Path(snapshot_download(name, revision=commit, allow_patterns=patterns)), commit
    except (GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) as error:
        raise _hub_refusal(name, revision, error) from error
    except (OfflineModeIsEnabled, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        cached = _cached_snapshot(name, revision, patterns)
        if cached is None:
            raise ModelError(
                "the Hub cannot be reached and the model is not in its cache",
                where="model.path",
                got=f"{name} ({type(error).__name__})",
                do="connect once, or copy the model to this machine and set model.path to its folder; "
                "model.path=builtin:smollm2-135m-instruct needs no Hub",
            ) from error
        say(f"the Hub cannot be reached; base model {name} at {cached.name[:12]} from its cache")
        return cached, cached.name


def load_tokenizer(directory: str | Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder.

    Raises:
        ModelError: it cannot be loaded.
    """
    try:
        loaded = AutoTokenizer.from_pretrained(
            str(directory), local_files_only=True, trust_remote_code=trust_remote_code
        )
    except (ValueError, OSError, KeyError, ImportError) as error:
        raise ModelError("the tokenizer cannot be loaded", where=str(directory), got=str(error)[:400]) from error
    return cast(PreTrainedTokenizerBase, loaded)


def load_model(
    directory: str | Path, *, dtype: torch.dtype, trust_remote_code: bool = False, dropout: bool = True
) -> PreTrainedModel:
    """The model in ``directory`` with its weights in ``dtype``, packed attention, and no KV cache by default.

    ``dropout=False`` sets the config's attention dropout to zero (for inference it is off anyway).
    The embedding's padding index is removed: with it the padding token, often the end-of-turn token, would never learn
    its embedding, and here padding is known by position.

    Raises:
        ModelError: not a causal language model, or its code does not take our attention.
    """
    register()
    refuse_config(read_config(Path(directory)))
    options: dict[str, Any] = {} if dropout else {"attention_dropout": 0.0}
    try:
        with without_progress_bars():
            loaded = AutoModelForCausalLM.from_pretrained(
                str(directory),
                dtype=dtype,
                attn_implementation=IMPLEMENTATION,
                local_files_only=True,
                trust_remote_code=trust_remote_code,
                use_safetensors=True,
                output_loading_info=True,
                **options,
            )
    except (ValueError, OSError, KeyError, ImportError, RuntimeError) as error:
        raise ModelError("the model cannot be loaded", where=str(directory), got=str(error)[:600]) from error
    model, report = cast(tuple[PreTrainedModel, dict[str, Any]], loaded)
    _check_loading(report, Path(directory))
    model.config.use_cache = False
    embedding = model.get_input_embeddings()
    if isinstance(embedding, torch.nn.Embedding):
        embedding.padding_idx = None
    return model


def matmul_shape(directory: str | Path) -> tuple[int, int]:
    """(hidden, feed-forward) size of a model folder, what ``resolve_dtype`` measures with."""
    config = AutoConfig.from_pretrained(str(directory), local_files_only=True).get_text_config().to_dict()
    hidden = int(config["hidden_size"])
    return hidden, int(config.get("intermediate_size") or 4 * hidden)


def _resolve_builtin(
    path: str,
    revision: str | None,
    cache: Path,
    tiny_texts: Sequence[str],
    seed: int,
) -> BaseModel:
    if revision is not None:
        raise ModelError("a built-in model has no revisions", where="model.revision", got=revision)
    name = path.removeprefix(BUILTIN_PREFIX)
    if name == builtin.SMOLLM2:
        folder, attribution = builtin.smollm2(cache), builtin.SMOLLM2_ATTRIBUTION
    elif name == builtin.TINY:
        folder, attribution = builtin.tiny(cache, tiny_texts, seed), builtin.TINY_ATTRIBUTION
    else:
        allowed = [f"{BUILTIN_PREFIX}{known}" for known in (builtin.SMOLLM2, builtin.TINY)]
        raise ModelError(
            "no such built-in model",
            where="model.path",
            got=path,
            allowed=", ".join(allowed),
            do=nearest(path, allowed),
        )
    return describe_folder(folder, name=path, revision="", trust_remote_code=False, attribution=attribution)


def _missing_folder(path: str, folder: Path) -> ModelError:
    siblings = sorted(entry.name for entry in folder.parent.iterdir()) if folder.parent.is_dir() else []
    return ModelError(
        "no such model folder" if not folder.exists() else "not a folder",
        where="model.path",
        got=path,
        allowed="a folder with config.json and safetensors, a Hub id (ORG/NAME), builtin:smollm2-135m-instruct",
        do=nearest(folder.name, siblings) or "check the path",
    )


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


def _check_loading(report: Mapping[str, Any], folder: Path) -> None:
    """transformers fills what it does not find with random values and only warns: here that is an error."""
    missing = sorted(report["missing_keys"])
    mismatched = sorted(str(entry) for entry in report["mismatched_keys"])
    if missing or mismatched:
        different = [*missing, *mismatched]
        raise ModelError(
            "the weights do not fit the config: some would have been filled with random values",
            where=str(folder),
            got=f"{len(different)} tensors missing or of another shape, first {different[0]}",
            do="use the config.json that belongs to these weights",
        )


def _hub_refusal(name: str, revision: str | None, error: Exception) -> ModelError:
    if isinstance(error, GatedRepoError):
        what, do = "this model is gated", f"accept its terms on https://huggingface.co/{name}, then: hf auth login"
    elif isinstance(error, RevisionNotFoundError):
        what, do = "no such revision of this model", "set model.revision to a branch, tag or commit of the model"
    elif isinstance(error, RepositoryNotFoundError):
        what, do = "no such model on the Hub", "check the name; for a private model: hf auth login"
    else:
        what, do = "neither a folder nor a Hub id", "give a folder, ORG/NAME, or builtin:smollm2-135m-instruct"
    got = name if revision is None else f"{name}@{revision}"
    return ModelError(what, where="model.path", got=got, do=do)


def _cached_snapshot(name: str, revision: str | None, patterns: Sequence[str]) -> Path | None:
    try:
        return Path(
            snapshot_download(name, revision=revision, allow_patterns=list(patterns), local_files_only=True)
        ).resolve()
    except (LocalEntryNotFoundError, EntryNotFoundError, OSError):
        return None


def _listing(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir())
    shown = ", ".join(names[:12]) or "an empty folder"
    return f"{shown}, ... ({len(names)} files)" if len(names) > 12 else shown


def _product(shape: Sequence[int]) -> int:
    result = 1
    for size in shape:
        result *= int(size)
    return result
