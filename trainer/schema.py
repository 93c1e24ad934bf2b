"""Hold plain values (dicts, lists, numbers, text) against the dataclasses of ``config/``.

msgspec stops at the first value that does not fit and knows nothing of near misses. This walk goes on, so that a user
sees every misspelt key and every wrong value of a config at once, each with what is allowed there.
"""

import ast
import functools
import inspect
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, cast, get_args, get_origin, get_type_hints

import msgspec

from trainer.errors import Problem, nearest

_TYPE_NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
Locate = Callable[[str], str]
"""Key path to what a problem there is headed with: the path itself, and the file that says it."""


OTHER_NAMES = {
    "adam_epsilon": "optim.eps",
    "base_model": "model.path",
    "batch_size": "optim.batch_packs",
    "bf16": "model.dtype",
    "cutoff_len": "packing.capacity",
    "dataset": "data.train",
    "dataset_path": "data.train",
    "early_stopping_patience": "eval.patience",
    "eval_steps": "eval.every",
    "fp16": "model.dtype",
    "gradient_accumulation_steps": "optim.batch_packs",
    "gradient_checkpointing": "model.activation_checkpointing",
    "grad_clip": "optim.clip_norm",
    "learning_rate": "optim.lr",
    "load_in_4bit": "method.quantize",
    "lora_alpha": "method.alpha",
    "lora_dropout": "method.dropout",
    "lora_r": "method.rank",
    "lora_rank": "method.rank",
    "lora_target_modules": "method.targets",
    "lr_scheduler": "optim.schedule",
    "lr_scheduler_type": "optim.schedule",
    "max_grad_norm": "optim.clip_norm",
    "max_length": "packing.capacity",
    "max_seq_len": "packing.capacity",
    "max_seq_length": "packing.capacity",
    "model_name": "model.path",
    "model_name_or_path": "model.path",
    "neftune_noise_alpha": "optim.neftune_alpha",
    "num_epochs": "optim.epochs",
    "num_train_epochs": "optim.epochs",
    "output_dir": "run.dir",
    "per_device_train_batch_size": "optim.batch_packs",
    "quantization": "method.quantize",
    "r": "method.rank",
    "save_steps": "checkpoint.every",
    "save_total_limit": "checkpoint.keep",
    "sequence_len": "packing.capacity",
    "torch_compile": "model.compile",
    "target_modules": "method.targets",
    "torch_dtype": "model.dtype",
    "train_file": "data.train",
    "validation_file": "data.validation",
    "warmup_ratio": "optim.warmup",
}
"""What other tools call a key, for the advice on an unknown one; never accepted in its place."""


@dataclass(frozen=True, slots=True)
class Shape:
    """A type hint taken apart: ``core`` without ``| None`` and ``Annotated``; ``limits`` of the latter."""

    core: Any
    limits: tuple[msgspec.Meta, ...]
    nullable: bool


def shape(hint: Any) -> Shape:
    """Take a type hint apart."""
    nullable = False
    limits: tuple[msgspec.Meta, ...] = ()
    while True:
        origin = get_origin(hint)
        if origin is Annotated:
            limits += tuple(entry for entry in hint.__metadata__ if isinstance(entry, msgspec.Meta))
            hint = get_args(hint)[0]
        elif origin in (Union, UnionType):
            parts = [part for part in get_args(hint) if part is not NoneType]
            nullable = nullable or len(parts) < len(get_args(hint))
            if len(parts) > 1:  # a number or a word: what fits is for msgspec to say
                return Shape(functools.reduce(operator.or_, parts), limits, nullable)
            (hint,) = parts
        else:
            return Shape(hint, limits, nullable)


def field_hints(section: type) -> dict[str, Any]:
    """Return ``{field: type hint}`` of a dataclass, ranges included."""
    return get_type_hints(section, include_extras=True)


def hint_at(root: type, path: Sequence[str]) -> Any | Problem:
    """Return the type hint of the value at ``path`` below the dataclass ``root``, or the problem with that path."""
    hint: Any = root
    for depth, key in enumerate(path):
        core = shape(hint).core
        where = ".".join(path[: depth + 1])
        if is_dataclass(core):
            hints = field_hints(cast(type, core))
            if key not in hints:
                return unknown_key(where, key, list(hints))
            hint = hints[key]
        elif get_origin(core) is dict:
            hint = get_args(core)[1]
        elif get_origin(core) is list and key.isdecimal():
            hint = get_args(core)[0]
        else:
            above = ".".join(path[:depth])
            return Problem(what=f"'{above}' has nothing below it", where=where, allowed=f"{above} = {describe(hint)}")
    return hint


def unknown_key(where: str, key: str, allowed: Sequence[str]) -> Problem:
    """Say that there is no such key, and which ones there are."""
    do = f"did you mean '{OTHER_NAMES[key]}'?" if key in OTHER_NAMES else nearest(key, allowed) or "remove it"
    return Problem(what="unknown key", where=where, got=key, allowed=", ".join(allowed), do=do)


def describe(hint: Any) -> str:
    """Say in words what a type allows: ``a number from 0 to 1``, ``cosine, linear``, ``a list: [text, ...]``."""
    parts = shape(hint)
    core = parts.core
    if get_origin(core) is Literal:
        text = ", ".join(str(choice) for choice in get_args(core))
    elif get_origin(core) is list:
        text = f"a list: [{describe(get_args(core)[0])}, ...]"
    elif get_origin(core) is dict:
        text = "pairs: {name: text, ...}"
    elif get_origin(core) in (Union, UnionType):
        return " or ".join(describe(part) for part in get_args(core)) + (", or null" if parts.nullable else "")
    elif is_dataclass(core):
        text = "a section with the keys " + ", ".join(field.name for field in fields(core))
    else:
        text = _TYPE_NAMES[core]
    return text + _limits_in_words(parts.limits) + (", or null" if parts.nullable else "")


def _limits_in_words(limits: Sequence[msgspec.Meta]) -> str:
    """Render ranges: `` >= 0 and < 1``, `` of length 2``."""
    words: list[str] = []
    for limit in limits:
        bounds = ((">=", limit.ge), (">", limit.gt), ("<=", limit.le), ("<", limit.lt))
        words += [
            f"{sign} {bound}" if isinstance(bound, int) else f"{sign} {bound:g}"
            for sign, bound in bounds
            if bound is not None
        ]
        if limit.min_length is not None:
            words.append(f"of length {limit.min_length}")
    return " " + " and ".join(words) if words else ""


def fit(value: Any, hint: Any, path: str, locate: Locate, found: list[Problem]) -> Any:
    """Return ``value`` in the shape that ``hint`` asks for, and append every misfit to ``found``.

    A single text where a list of texts belongs becomes a list of one; a whole number where a number belongs becomes a
    float. Nothing else is converted.
    """
    parts = shape(hint)
    core = parts.core
    if value is None and parts.nullable:
        return None
    if is_dataclass(core):
        return _fit_section(value, cast(type, core), path, locate, found)
    if get_origin(core) is list:
        return _fit_list(value, hint, path, locate, found)
    if get_origin(core) is dict:
        return _fit_pairs(value, hint, path, locate, found)
    return _fit_leaf(value, hint, path, locate, found)


def _fit_section(value: Any, section: type, path: str, locate: Locate, found: list[Problem]) -> Any:
    hints = field_hints(section)
    if not isinstance(value, Mapping):
        found.append(_misfit(value, section, path, locate))
        return None
    fitted: dict[str, Any] = {}
    for key, entry in cast("Mapping[Any, Any]", value).items():
        below = f"{path}.{key}" if path else str(key)
        if key in hints:
            fitted[key] = fit(entry, hints[key], below, locate, found)
        else:
            found.append(unknown_key(locate(below), str(key), list(hints)))
    missing = [field.name for field in fields(section) if _is_required(section, field.name) and field.name not in value]
    found += [
        Problem(what="must be given", where=locate(f"{path}.{name}"), allowed=describe(hints[name])) for name in missing
    ]
    return fitted


def _is_required(section: type, name: str) -> bool:
    field = next(field for field in fields(section) if field.name == name)
    return field.default is field.default_factory


def _fit_list(value: Any, hint: Any, path: str, locate: Locate, found: list[Problem]) -> Any:
    (entry_hint,) = get_args(shape(hint).core)
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list):
        found.append(_misfit(value, hint, path, locate))
        return None
    entries = cast("list[Any]", value)
    before = len(found)
    fitted = [fit(entry, entry_hint, f"{path}[{index}]", locate, found) for index, entry in enumerate(entries)]
    if len(found) == before:
        try:
            msgspec.convert(fitted, hint)
        except msgspec.ValidationError:
            found.append(_misfit(value, hint, path, locate))
    return fitted


def _fit_pairs(value: Any, hint: Any, path: str, locate: Locate, found: list[Problem]) -> Any:
    if not isinstance(value, Mapping):
        found.append(_misfit(value, hint, path, locate))
        return None
    entry_hint = get_args(shape(hint).core)[1]
    pairs = cast("Mapping[Any, Any]", value).items()
    return {str(key): fit(entry, entry_hint, f"{path}.{key}", locate, found) for key, entry in pairs}


def _fit_leaf(value: Any, hint: Any, path: str, locate: Locate, found: list[Problem]) -> Any:
    finite = not isinstance(value, float) or math.isfinite(value)
    try:
        fitted = msgspec.convert(value, hint, strict=True)
    except msgspec.ValidationError:
        finite = False
        fitted = None
    if not finite:
        found.append(_misfit(value, hint, path, locate))
    return fitted


def _misfit(value: Any, hint: Any, path: str, locate: Locate) -> Problem:
    """Say that ``value`` does not fit ``hint``, with the nearest choice or how to write text."""
    core = shape(hint).core
    do = ""
    if get_origin(core) is Literal and isinstance(value, str):
        do = nearest(value, [str(choice) for choice in get_args(core)])
    elif core is str and not isinstance(value, (dict, list)):
        do = f'put it in quotes: "{_written(value)}"'
    return Problem(
        what="does not fit",
        where=locate(path),
        got=f"{_written(value)} ({_kind(value)})",
        allowed=describe(hint),
        do=do,
    )


def _written(value: Any) -> str:
    """Render a value as YAML users write it."""
    return (
        {True: "true", False: "false", None: "null"}[value]
        if value is None or value is True or value is False
        else str(value)
    )


def _kind(value: Any) -> str:
    """Name the type of a value in words."""
    kinds: dict[type, str] = {
        bool: "true or false",
        int: "whole number",
        float: "number",
        str: "text",
        list: "list",
        dict: "pairs",
    }
    return "null" if value is None else kinds[type(value)]


def section_help(name: str, section: type) -> list[str]:
    """Return lines for people: what the section ``name`` is for, and its keys with type, default and meaning."""
    defaults, docs = msgspec.to_builtins(section()), field_docs(section)
    lines = [f"{name}: {' '.join((section.__doc__ or '').split())}"]
    for key, hint in field_hints(section).items():
        default = msgspec.json.encode(defaults[key]).decode()
        lines += [f"  {name}.{key}={default}  ({describe(hint)})", f"      {docs[key]}"]
    return [line.replace("``", "`") for line in lines]


def field_docs(section: type) -> dict[str, str]:
    """Return ``{field: its docstring}`` of a dataclass: the text below each field, on one line."""
    (tree,) = ast.parse(inspect.getsource(section)).body
    assert isinstance(tree, ast.ClassDef)
    docs: dict[str, str] = {}
    name = ""
    for statement in tree.body:
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            name = statement.target.id
        elif name and isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
            docs[name] = " ".join(str(statement.value.value).split())
            name = ""
    return docs
