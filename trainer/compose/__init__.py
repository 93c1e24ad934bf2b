"""``conf/`` and the command line become a ``Config``, or one error that lists everything wrong with them.

The only package that knows Hydra and OmegaConf. Hydra composes the groups; values are laid over the defaults of the
dataclasses in ``config/`` and held against their types by ``schema.py``. Hydra itself stops at the first problem
and names neither file nor nearest key; a job that waited in a queue should not fail five times for five typing errors.
Nothing is ever instantiated: ``_target_`` is an unknown key like any other, and YAML tags are refused.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import msgspec
import yaml
from hydra.core.override_parser.types import Override

from trainer.compose.command_line import multirun, quoted, read_command_line
from trainer.compose.library import PACKAGE_LINE, Layer, Library, find_layers
from trainer.compose.merge import apply_values, compose_files, resolve
from trainer.config import Config
from trainer.errors import ConfigError, Problem
from trainer.redaction import REDACTED, is_secret_name, looks_secret, redact
from trainer.schema import Locate, field_hints, fit, section_help, shape

__all__ = ["compose", "config_text", "expand_multirun", "help_text", "quoted"]


def compose(overrides: Sequence[str], *, config_dir: Path | None, cwd: Path) -> Config:
    """Return the config that the groups, the experiment and ``overrides`` make together.

    Overrides are Hydra's: ``group=choice``, ``key=value``, ``+key=value``, ``++key=value``, ``~key`` (back to the
    default), and ``experiment=NAME`` with or without ``+``. A key that ``config/`` does not know is an error with
    any of these signs.

    Raises:
        ConfigError: with all problems of names, choices, files, types and ranges.
    """
    library = Library.open(config_dir, cwd)
    found: list[Problem] = []
    request = read_command_line(overrides, library, found)
    layers = find_layers(request.experiments, request.choices, library, cwd, found)
    tree, refused = compose_files(request, library, layers, found)
    apply_values(tree, request.values, found)
    locate = _locator(request.values, layers)
    plain = resolve(tree, "", locate, found)
    fitted = fit(plain, Config, "", locate, found)
    _refuse_secrets(plain, "", locate, found)
    if refused is not None and not found:
        found.append(refused)
    if found:
        raise ConfigError.of([_without_secrets(problem) for problem in dict.fromkeys(found)])
    return msgspec.convert(fitted, Config)


def _locator(values: Sequence[Override], layers: Sequence[Layer]) -> Any:
    """Return a function that heads a problem with the last place that set its key."""
    keys = [override.key_or_group for override in values]

    def locate(path: str) -> str:
        parts = [part for part in re.split(r"[.\[\]]+", path) if part]
        if any(parts[: len(key.split("."))] == key.split(".") for key in keys):
            return f"command line: {path}"
        for layer in reversed(layers):
            if _says(layer.body, parts):
                return f"{layer.name}: {path}"
        return path

    return locate


def _says(body: Any, parts: Sequence[str]) -> bool:
    """Say whether a file's content has something at this path."""
    for part in parts:
        if isinstance(body, dict) and part in body:
            body = cast("dict[str, Any]", body)[part]
        elif isinstance(body, list) and part.isdecimal() and int(part) < len(cast("list[Any]", body)):
            body = cast("list[Any]", body)[int(part)]
        else:
            return False
    return bool(parts)


def _refuse_secrets(value: Any, path: str, locate: Locate, found: list[Problem]) -> None:
    """Append a problem for every text in the config that looks like a secret."""
    if isinstance(value, dict):
        for key, entry in cast("dict[Any, Any]", value).items():
            _refuse_secrets(entry, f"{path}.{key}" if path else str(key), locate, found)
    elif isinstance(value, list):
        for index, entry in enumerate(cast("list[Any]", value)):
            _refuse_secrets(entry, f"{path}[{index}]", locate, found)
    elif isinstance(value, str) and (looks_secret(value) or is_secret_name(path.rpartition(".")[2])):
        do = "remove it here, change it where it was issued, and set it as an environment variable (HF_TOKEN, ...)"
        found.append(
            Problem(
                what="looks like a secret",
                where=locate(path),
                got=REDACTED,
                allowed="no secrets: config is written into run folders",
                do=do,
            )
        )


def _without_secrets(problem: Problem) -> Problem:
    """Return the problem with secrets removed from all its parts."""
    return Problem(
        what=redact(problem.what),
        where=redact(problem.where),
        got=redact(problem.got),
        allowed=redact(problem.allowed),
        do=redact(problem.do),
    )


def expand_multirun(overrides: Sequence[str], *, config_dir: Path | None, cwd: Path) -> list[list[str]]:
    """Return one list of overrides per run for ``-m a=1,2 b=3,4``; the last key varies fastest.

    ``group=glob(*)`` means all matching choices of a group.

    Raises:
        ConfigError: an override cannot be read, or asks for a sweep without fixed values (``interval(0,1)``).
    """
    found: list[Problem] = []
    runs = multirun(overrides, Library.open(config_dir, cwd), found)
    if found:
        raise ConfigError.of([_without_secrets(problem) for problem in found])
    return runs


def config_text(config: Config) -> str:
    """Return the whole config as YAML, sections in the order of ``config/``."""
    return yaml.safe_dump(msgspec.to_builtins(config), sort_keys=False, allow_unicode=True, width=120)


def help_text(*, config_dir: Path | None, cwd: Path) -> str:
    """Return the groups with their choices, the experiments, and every key with type, default and meaning."""
    library = Library.open(config_dir, cwd)
    lines = ["Groups (group=choice):"]
    lines += [
        f"  {group:10} {', '.join(choices)}" for group, choices in library.groups.items() if group != "experiment"
    ]
    lines += ["", "Experiments (+experiment=NAME):"]
    lines += [f"  {name:20} {_first_comment(path)}" for name, path in library.groups.get("experiment", {}).items()]
    lines += ["", "Searched: " + ", ".join(str(directory) for directory in library.directories), ""]
    lines.append("Keys (key=value):")
    for section, hint in field_hints(Config).items():
        lines += ["", *section_help(section, shape(hint).core)]
    return "\n".join(lines) + "\n"


def _first_comment(path: Path) -> str:
    """Return the first comment line of a YAML file that says something to people."""
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("#") and not PACKAGE_LINE.match(line):
            return line.lstrip("# ").strip()
    return ""
