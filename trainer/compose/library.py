"""The config files: which choices there are, and which files take part in one composition.

Hydra would find all this as well, but tells nobody which file said what, and stops at the first wrong name. Here every
file is read by itself, so that a message can name it.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, cast

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from trainer.config import Config
from trainer.errors import ConfigError, Problem, nearest
from trainer.paths import conf_directories

SECTIONS = tuple(entry.name for entry in fields(Config))
SEVERAL = ("tracking",)
"""Groups of which several files may be taken at once, as Hydra writes it: ``tracking=[wandb,tensorboard]``."""
Choice = str | list[str]
"""The file of a group, or the files of one of ``SEVERAL``."""
PACKAGE_LINE = re.compile(r"^#\s*@package\s+(\S+)\s*$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Library:
    """All config files: ``groups[group][choice]`` is the file that a choice means; earlier directories win."""

    directories: tuple[Path, ...]
    groups: dict[str, dict[str, Path]]

    @classmethod
    def open(cls, config_dir: Path | None, cwd: Path) -> "Library":
        """List the files of ``--config-dir``, ``./conf`` and the shipped conf.

        Raises:
            ConfigError: ``config_dir`` is given and is not a folder.
        """
        if config_dir is not None and not config_dir.is_dir():
            raise ConfigError(
                "there is no such config folder",
                where="--config-dir",
                got=config_dir,
                allowed="a folder with config groups (experiment/, model/, ...)",
                do="check the path",
            )
        directories = tuple(conf_directories(config_dir, cwd))
        groups: dict[str, dict[str, Path]] = {}
        for group in (*SECTIONS, "experiment"):
            choices: dict[str, Path] = {}
            for folder in (directory / group for directory in directories):
                for file in sorted(folder.rglob("*.yaml")):
                    choices.setdefault(file.relative_to(folder).with_suffix("").as_posix(), file)
            if choices:
                groups[group] = dict(sorted(choices.items()))
        return cls(directories, groups)

    @property
    def primary(self) -> Path:
        """``config.yaml``, the first one found."""
        return next(path for path in (folder / "config.yaml" for folder in self.directories) if path.is_file())


@dataclass(frozen=True, slots=True)
class Layer:
    """What one file says, placed where its package puts it; ``name`` is how messages call the file."""

    name: str
    body: dict[str, Any]
    defaults: list[Any]


def find_layers(
    experiments: Sequence[str], choices: Mapping[str, Choice | None], library: Library, cwd: Path, found: list[Problem]
) -> list[Layer]:
    """Return every file that takes part, lowest first: config.yaml, groups, experiments with what they build on."""
    seen: dict[Path, Layer] = {}
    primary = _read_layer(library.primary, "", cwd, seen, found)
    taken: dict[str, Choice] = {}
    above: list[Layer] = []
    for entry in primary.defaults:
        taken |= checked_choice(entry, primary, library, found)
    for name in experiments:
        above += _experiment_layers(name, library, cwd, seen, found)
    for layer in above:
        for entry in layer.defaults:
            taken |= checked_choice(entry, layer, library, found)
    taken |= {group: name for group, name in choices.items() if name is not None}
    chosen = [
        _read_layer(library.groups[group][name], group, cwd, seen, found)
        for group, choice in taken.items()
        if choices.get(group, choice) is not None
        for name in names_of(choice)
    ]
    return [primary, *chosen, *above]


def _experiment_layers(
    name: str, library: Library, cwd: Path, seen: dict[Path, Layer], found: list[Problem]
) -> list[Layer]:
    """Return the experiment ``name`` after the experiments that its defaults list names."""
    path = library.groups["experiment"][name]
    if path in seen:
        return []
    layer = _read_layer(path, "experiment", cwd, seen, found)
    below: list[Layer] = []
    for entry in layer.defaults:
        if not isinstance(entry, str) or entry == "_self_":
            continue
        # Hydra's rule: a plain name is looked for beside the file that says it.
        beside = f"{name.rpartition('/')[0]}/{entry}".removeprefix("/")
        parent = entry.removeprefix("/experiment/") if entry.startswith("/") else beside
        if parent in library.groups["experiment"]:
            below += _experiment_layers(parent, library, cwd, seen, found)
        else:
            found.append(unknown_choice(f"{layer.name}: defaults", "experiment", parent, library))
    return [*below, layer]


def names_of(choice: Choice) -> list[str]:
    """The files that a choice names."""
    return [choice] if isinstance(choice, str) else choice


def group_choice(entry: object) -> dict[str, Choice]:
    """Return ``{group: choice}`` of one entry of a defaults list, or nothing for ``_self_`` and plain names."""
    if not isinstance(entry, dict):
        return {}
    found: dict[str, Choice] = {}
    for key, choice in cast("dict[Any, Any]", entry).items():
        group = str(key).removeprefix("override ").removeprefix("optional ").strip().removeprefix("/")
        if isinstance(choice, list) and group in SEVERAL:
            found[group] = [str(name) for name in cast("list[Any]", choice)]
        elif choice is not None:
            found[group] = str(choice)
    return found


def checked_choice(entry: object, layer: Layer, library: Library, found: list[Problem]) -> dict[str, Choice]:
    """Return what ``group_choice`` does, without groups and choices that do not exist: those go to ``found``."""
    checked: dict[str, Choice] = {}
    for group, choice in group_choice(entry).items():
        where = f"{layer.name}: defaults"
        if group not in library.groups:
            do = nearest(group, list(library.groups)) or "remove it"
            found.append(
                Problem(what="unknown group", where=where, got=group, allowed=", ".join(library.groups), do=do)
            )
        elif unknown := [name for name in names_of(choice) if name not in library.groups[group]]:
            found += [unknown_choice(where, group, name, library) for name in unknown]
        else:
            checked[group] = choice
    return checked


def _read_layer(path: Path, group: str, cwd: Path, seen: dict[Path, Layer], found: list[Problem]) -> Layer:
    """Read one YAML file; one that cannot be read goes to ``found`` and counts as empty."""
    home = cwd.resolve()
    name = path.relative_to(home).as_posix() if path.is_relative_to(home) else str(path)
    body: dict[str, Any] = {}
    package = ""
    try:
        text = path.read_text(encoding="utf-8")
        header = PACKAGE_LINE.search(text.partition("defaults:")[0])
        package = header[1].replace("_global_", "").replace("_group_", group) if header else group
        if group == "experiment" and package:
            do = "make '# @package _global_' its first line"
            found.append(Problem(what="would set keys of the section 'experiment' only", where=name, do=do))
            package = ""
        loaded = OmegaConf.to_container(OmegaConf.create(text), resolve=False) if text.strip() else {}
        if isinstance(loaded, dict):
            body = cast("dict[str, Any]", loaded)
        else:
            found.append(Problem(what="not a mapping of keys", where=name, allowed="key: value", do="mend the file"))
    except (yaml.YAMLError, UnicodeDecodeError, OmegaConfBaseException) as error:
        problem = " ".join(str(error).split())
        found.append(Problem(what="not a readable YAML file", where=name, got=problem, do="mend the file"))
    defaults = body.pop("defaults", None) or []
    for key in reversed([part for part in package.split(".") if part]):
        body = {key: body}
    seen[path] = Layer(name, body, cast("list[Any]", defaults))
    return seen[path]


NOT_OFFERED = {
    "ulysses": "no installed library divides one sequence among ranks and keeps the documents of a pack apart",
    "context": "torch's context parallelism has one causal mask for a sequence, so documents of a pack would meet",
}
"""Layouts that people ask for, and why there are none."""


def unknown_choice(where: str, group: str, name: object, library: Library) -> Problem:
    """Say that a group has no such choice, which ones it has, and where one could be added."""
    choices = list(library.groups.get(group, {}))
    if group == "parallel" and (why := NOT_OFFERED.get(str(name))):
        do = (
            "parallel=fsdp with model.activation_checkpointing=true and a smaller packing.capacity; see docs/layouts.md"
        )
        return Problem(what=f"is not offered: {why}", where=where, got=str(name), allowed=", ".join(choices), do=do)
    what = "unknown experiment" if group == "experiment" else f"unknown choice of the group '{group}'"
    folders = ", ".join(str(directory) for directory in library.directories)
    do = nearest(str(name), choices) or f"choose one of these, or add {group}/{name}.yaml to one of: {folders}"
    return Problem(what=what, where=where, got=str(name), allowed=", ".join(choices), do=do)
