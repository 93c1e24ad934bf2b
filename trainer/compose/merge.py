"""Defaults, files and values laid over each other: Hydra composes the groups, OmegaConf fills in ``${...}``.

Values are applied here and not by Hydra, which would stop at the first that it cannot set.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

import msgspec
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from trainer.compose.command_line import Request, quoted
from trainer.compose.library import Choice, Layer, Library, group_choice
from trainer.config import Config
from trainer.errors import Problem
from trainer.schema import Locate, hint_at, shape

_ENVIRONMENT = re.compile(r"\$\{\s*oc\.env\b|\$\{\s*env:")


def compose_files(
    request: Request, library: Library, layers: list[Layer], found: list[Problem]
) -> tuple[DictConfig, Problem | None]:
    """Return defaults, groups and experiments laid over each other, and what Hydra could not do with them.

    Where some file or choice is already in ``found``, Hydra would only stop there; then, and where it cannot compose
    the files, they are merged in the order that it would use, so that their other problems are found as well.
    """
    merged = _defaults()
    if request.experiments:
        merged["run"]["name"] = request.experiments[-1].rpartition("/")[2]
    bodies: list[dict[str, Any]] = [layer.body for layer in layers]
    refused = None
    if not found:
        try:
            bodies = [_with_hydra(request, library, layers[0])]
        except (HydraException, OmegaConfBaseException, RecursionError) as error:
            refused = Problem(
                what="the files cannot be composed",
                where=", ".join(layer.name for layer in layers[1:] if layer.defaults) or layers[0].name,
                got=" ".join(str(error).split()),
                do="check the defaults lists of these files",
            )
    for body in bodies:
        merged = _laid_over(merged, body)
    return OmegaConf.create(merged), refused


def _defaults() -> dict[str, Any]:
    """Return the dataclasses' defaults as plain dicts."""
    return cast("dict[str, Any]", msgspec.to_builtins(Config()))


def _laid_over(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Merge ``above`` into ``below``: sections key by key, everything else as a whole, also where the kinds differ."""
    merged = dict(below)
    for key, value in above.items():
        under = merged.get(key)
        if isinstance(value, dict) and isinstance(under, dict):
            merged[key] = _laid_over(cast("dict[str, Any]", under), cast("dict[str, Any]", value))
        else:
            merged[key] = value
    return merged


def _with_hydra(request: Request, library: Library, primary: Layer) -> dict[str, Any]:
    """Let Hydra compose the groups; values are applied afterwards."""
    known: dict[str, Choice] = {}
    for entry in primary.defaults:
        known |= group_choice(entry)
    overrides = [
        f"~{group}" if name is None else f"{'' if group in known else '+'}{group}={_written(name)}"
        for group, name in request.choices.items()
        if name is not None or group in known
    ]
    if request.experiments:
        overrides.append(f"+experiment=[{','.join(map(quoted, request.experiments))}]")
    first, *_FurtherFolders.folders = (str(directory) for directory in library.directories)
    Plugins.instance().register(_FurtherFolders)
    GlobalHydra.instance().clear()
    with initialize_config_dir(config_dir=first, version_base="1.3", job_name="trainer"):
        composed = hydra_compose("config", overrides)
    return cast("dict[str, Any]", OmegaConf.to_container(composed, resolve=False))


class _FurtherFolders(SearchPathPlugin):
    """Hydra's way to search more than one folder; ``hydra.searchpath`` finds groups there, but no config.yaml."""

    folders: ClassVar[list[str]] = []

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        for folder in self.folders:
            search_path.append("trimtab", f"file://{folder}")


def _written(choice: Choice) -> str:
    """A choice as Hydra's grammar has it."""
    return quoted(choice) if isinstance(choice, str) else f"[{','.join(map(quoted, choice))}]"


def apply_values(tree: DictConfig, values: Sequence[Override], found: list[Problem]) -> None:
    """Lay ``key=value`` over the composed tree, in order; ``~key`` brings the default back."""
    OmegaConf.set_struct(tree, False)
    for override in values:
        key = override.key_or_group
        if override.is_delete():
            _delete(tree, override, found)
            continue
        try:
            value = _value_for(override)
            merge = isinstance(value, dict) and isinstance(OmegaConf.select(tree, key), DictConfig)
            OmegaConf.update(tree, key, value, merge=merge, force_add=True)
        except (OmegaConfBaseException, IndexError) as error:
            got = " ".join(str(error).split())
            found.append(Problem(what="cannot be set", where=f"command line: {key}", got=got, do="check the key"))


def _delete(tree: DictConfig, override: Override, found: list[Problem]) -> None:
    """Bring back the default of a key (``~key``), or only if it has a value (``~key=value``)."""
    key = override.key_or_group
    expected = override.value()
    current: object = OmegaConf.select(tree, key)
    if expected is not None and current != expected:
        what = "is not removed, because it has another value"
        found.append(
            Problem(what=what, where=f"command line: ~{key}", got=str(current), allowed=str(expected), do=f"~{key}")
        )
        return
    defaults = OmegaConf.create(_defaults())
    above, _, last = key.rpartition(".")
    node = OmegaConf.select(tree, above) if above else tree
    if OmegaConf.select(defaults, key) is not None:
        OmegaConf.update(tree, key, OmegaConf.select(defaults, key), merge=False)
    elif isinstance(node, DictConfig):
        node.pop(last, None)


def _value_for(override: Override) -> Any:
    """Return the value as Hydra reads it, except that a key for text keeps what was typed (``revision=007``)."""
    value = cast(Any, override.value())
    core = shape(hint_at(Config, override.key_or_group.split("."))).core
    if isinstance(value, bool | int | float) and core in (str, list[str]):
        return (override.input_line or "").partition("=")[2].strip()
    return value


def resolve(node: Any, path: str, locate: Locate, found: list[Problem]) -> Any:
    """Return plain dicts and lists with all interpolations replaced; those that cannot be go to ``found``."""
    if not isinstance(node, DictConfig | ListConfig):
        return node
    keys: list[Any] = list(range(len(node))) if isinstance(node, ListConfig) else list(node)
    plain: dict[Any, Any] = {}
    for key in keys:
        below = f"{path}[{key}]" if isinstance(node, ListConfig) else f"{path}.{key}" if path else str(key)
        problem, value = _read_node(node, key, locate(below))
        if problem is not None:
            found.append(problem)
        else:
            plain[key] = resolve(value, below, locate, found)
    return list(plain.values()) if isinstance(node, ListConfig) else plain


def _read_node(node: DictConfig | ListConfig, key: Any, where: str) -> tuple[Problem | None, Any]:
    """Return the value below ``key``, or the problem with it."""
    raw = str(OmegaConf.to_container(node, resolve=False)[key])  # type: ignore[index]
    if OmegaConf.is_missing(node, key):
        return Problem(what="must be given", where=where, got="???", do="give it a value"), None
    if _ENVIRONMENT.search(raw) and OmegaConf.is_interpolation(node, key):
        do = "give the value on the command line, where the shell fills in variables"
        return Problem(what="the environment is not read", where=where, got=raw, allowed="${section.key}", do=do), None
    try:
        return None, node[key]
    except OmegaConfBaseException as error:
        got = f"{raw}: {' '.join(str(error).split())}"
        allowed = "${section.key} of a key that exists"
        return Problem(what="cannot be filled in", where=where, got=got, allowed=allowed, do="check the name"), None
