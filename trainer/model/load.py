"""From what the user wrote in ``model.path`` to a checked folder, and from the folder to a model ready to train.

Whatever the name was (folder, Hub id, built-in), it ends in a folder that ``folder.py`` has checked and described; from
there on nobody asks the network again.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # pyright: ignore[reportPrivateImportUsage]
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from trainer.console import say
from trainer.errors import ModelError, nearest
from trainer.model import builtin
from trainer.model.attention import IMPLEMENTATION, refuse_config, register
from trainer.model.folder import DESCRIBING_FILES, describe_folder, read_config
from trainer.model.precision import resolve_dtype as resolve_dtype
from trainer.model.quantised import Quantisation, check_quantised, keep_trainable, quantisation_config
from trainer.model.quiet import without_progress_bars
from trainer.samples import BaseModel

HUB_SECONDS = 10.0
"""How long the Hub may take to say at which commit a name is; without a limit it may take for ever."""
BUILTIN_PREFIX = "builtin:"
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


def fetch_from_hub(name: str, revision: str | None, *, trust_remote_code: bool) -> tuple[Path, str]:
    """Download (or find in the Hub's cache) the model ``name``: its folder and the commit it was resolved to.

    The commit is resolved first and then asked for, so that a branch that moves in between cannot mix two versions.
    A Hub that is down, slow or lets nobody in (a token that has expired) keeps no run from a model in the cache.

    Raises:
        ModelError: not a Hub id, not found, gated, or not reachable and not cached.
    """
    patterns = [*HUB_PATTERNS, "*.py"] if trust_remote_code else HUB_PATTERNS
    try:
        commit = str(HfApi().model_info(name, revision=revision, timeout=HUB_SECONDS).sha)
        say(f"base model {name} at {commit[:12]} from the Hub")
        return Path(snapshot_download(name, revision=commit, allow_patterns=patterns)), commit
    except (RevisionNotFoundError, HFValidationError) as error:
        raise _hub_refusal(name, revision, error) from error
    except (OfflineModeIsEnabled, HfHubHTTPError, HTTPError, LocalEntryNotFoundError, OSError) as error:
        cached = _cached_snapshot(name, revision, patterns)
        if cached is None and isinstance(error, GatedRepoError | RepositoryNotFoundError):
            raise _hub_refusal(name, revision, error) from error
        if cached is None:
            raise ModelError(
                "the Hub cannot be reached and the model is not in its cache",
                where="model.path",
                got=f"{name} ({type(error).__name__})",
                do="connect once, or copy the model to this machine and set model.path to its folder; "
                "model.path=builtin:smollm2-135m-instruct needs no Hub",
            ) from error
        refused = isinstance(error, GatedRepoError | RepositoryNotFoundError)
        why = "the Hub refuses it (the name, or the token)" if refused else "the Hub cannot be reached"
        say(f"{why}; base model {name} at {cached.name[:12]} from its cache")
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
    directory: str | Path,
    *,
    dtype: torch.dtype,
    trust_remote_code: bool = False,
    dropout: bool = True,
    quantize: Quantisation | None = None,
    device: torch.device | None = None,
) -> PreTrainedModel:
    """The model in ``directory`` with its weights in ``dtype``, packed attention, and no KV cache by default.

    ``dropout=False`` sets the config's attention dropout to zero (for inference it is off anyway). ``quantize`` holds
    the linear layers in 4 bits and computes in ``dtype``; they are quantised on ``device`` (None: the CPU).
    The embedding's padding index is removed: with it the padding token, often the end-of-turn token, would never learn
    its embedding, and here padding is known by position.

    Raises:
        ModelError: not a causal language model, its code does not take our attention, or nothing in it to quantise.
        RunError: ``quantize`` without bitsandbytes.
        TrainingFault: the layers are not in 4 bits afterwards.
    """
    register()
    refuse_config(read_config(Path(directory)))
    options: dict[str, Any] = {} if dropout else {"attention_dropout": 0.0}
    if quantize is not None:
        options["quantization_config"] = quantisation_config(quantize, dtype)
        options["device_map"] = {"": device or torch.device("cpu")}
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
    if quantize is not None:
        check_quantised(model, quantize, dtype)
        keep_trainable(model)
    settle(model)
    return model


def settle(model: PreTrainedModel) -> None:
    """No KV cache by default, and no padding index (see ``load_model``)."""
    model.config.use_cache = False
    embedding = model.get_input_embeddings()
    if isinstance(embedding, torch.nn.Embedding):
        embedding.padding_idx = None


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
