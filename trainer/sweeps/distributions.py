"""One parameter of a search space: its distribution in the words of W&B, and its values as words of a command line."""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

from trainer.errors import Problem, nearest

RANGES = ("uniform", "log_uniform_values", "int_uniform", "q_uniform")
DISTRIBUTIONS = ("constant", "categorical", *RANGES)
INSTEAD = {
    "log_uniform": "log_uniform_values: min and max are then the values themselves, and no exponents",
    "q_log_uniform": "log_uniform_values",
    "q_log_uniform_values": "log_uniform_values, or values: [...]",
    "inv_log_uniform": "log_uniform_values",
    "inv_log_uniform_values": "log_uniform_values",
    "normal": "uniform with min and max",
    "q_normal": "q_uniform with min and max",
    "log_normal": "log_uniform_values",
    "q_log_normal": "log_uniform_values",
    "beta": "uniform with min and max",
    "q_beta": "q_uniform with min and max",
    "categorical_w_probabilities": "values without probabilities",
}
"""Distributions of W&B that have no equal in Optuna, or bounds that no config can be held against."""
KEYS = ("distribution", "value", "values", "min", "max", "q")

Value = bool | int | float | str | list[Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameter:
    """``values`` of ``constant`` and ``categorical``; ``min``, ``max`` (both included) and ``step`` of a range."""

    name: str
    distribution: str
    values: tuple[Value, ...] = ()
    min: float | int = 0
    max: float | int = 0
    step: float | int | None = None

    @property
    def log(self) -> bool:
        """Whether its logarithm is uniform."""
        return self.distribution == "log_uniform_values"

    @property
    def whole(self) -> bool:
        """Whether a range has whole numbers only."""
        return self.distribution == "int_uniform"

    @property
    def constant(self) -> bool:
        """Whether all trials have the same value."""
        return self.distribution == "constant"

    @property
    def is_finite(self) -> bool:
        """Whether a grid can have all its values."""
        return bool(self.values) or self.step is not None

    @property
    def examples(self) -> tuple[Value, ...]:
        """What is tried before the first trial: all values, or both ends."""
        return self.values or (self.min, self.max)

    def grid(self) -> tuple[Value, ...]:
        """All values, lowest first for a range.

        Raises:
            ValueError: it is a range without steps.
        """
        if self.values:
            return self.values
        if self.step is None:
            raise ValueError(f"{self.name} has no fixed values")
        return tuple(itertools.takewhile(self._is_inside, self._steps(self.step)))

    def _is_inside(self, value: float | int) -> bool:
        return value <= self.max

    def _steps(self, step: float | int) -> Iterator[float | int]:
        for count in itertools.count():
            value = self.min + count * step
            yield value if isinstance(value, int) else round(value, 12)

    def override(self, value: object) -> str:
        """``key=value``, written exactly as W&B writes it."""
        return f"{self.name}={value}"


def read_parameter(name: str, body: object, where: str, found: list[Problem]) -> Parameter | None:
    """Read one entry of ``parameters``; what is wrong with it goes to ``found``, and None is returned."""
    problem = _wrong_form(body, where)
    if problem is None:
        keys = cast("dict[str, Any]", body)
        parameter = _from_values(name, keys, where) if "values" in keys or "value" in keys else None
        parameter = _range(name, keys, where) if parameter is None else parameter
        if isinstance(parameter, Parameter):
            return parameter
        problem = parameter
    found.append(problem)
    return None


def _wrong_form(body: object, where: str) -> Problem | None:
    if not isinstance(body, dict):
        do = f"{{value: {body}}}, or {{values: [{body}, ...]}}"
        return Problem(what="is no description of a parameter", where=where, got=str(body), do=do)
    keys = [str(key) for key in cast("dict[Any, Any]", body)]
    if "parameters" in keys or any(isinstance(entry, dict) for entry in cast("dict[Any, Any]", body).values()):
        do = f"dotted keys instead: {where.rpartition(' ')[2].removeprefix('parameters.')}.KEY: {{values: [...]}}"
        return Problem(what="nested parameters cannot be written as key=value", where=where, got=", ".join(keys), do=do)
    for key in keys:
        if key not in KEYS:
            do = nearest(key, KEYS) or (
                "remove it" if key != "probabilities" else INSTEAD["categorical_w_probabilities"]
            )
            return Problem(what="unknown key", where=f"{where}.{key}", got=key, allowed=", ".join(KEYS), do=do)
    return None


def _from_values(name: str, body: dict[str, Any], where: str) -> Parameter | Problem:
    said = body.get("distribution", "categorical" if "values" in body else "constant")
    given = body["values"] if "values" in body else [body["value"]]
    if said != ("categorical" if "values" in body else "constant") or len(body.keys() - {"distribution"}) != 1:
        do = "values: [...] alone, or value: ... alone"
        return Problem(what="says two things", where=where, got=", ".join(map(str, body)), do=do)
    if not isinstance(given, list) or not given:
        return Problem(what="is no list of values", where=where, got=str(given), allowed="values: [a, b]")
    values = cast("list[Any]", given)
    for value in values:
        problem = _unwritable(name, value, where)
        if problem is not None:
            return problem
    if len({str(value) for value in values}) < len(values):
        return Problem(what="names a value twice", where=where, got=str(values), do="name each once")
    return Parameter(name=name, distribution=said, values=tuple(values))


def _unwritable(name: str, value: object, where: str) -> Problem | None:
    """The problem of a value that would not come back from ``key=value``."""
    if value is None or (isinstance(value, list) and None in value):
        return Problem(
            what="null cannot be swept: W&B would write it as the text None",
            where=where,
            got="null",
            allowed="values, or choices of a group",
            do=f"leave {name} out for its default, or make a choice of a group for it (a file in ./conf/GROUP)",
        )
    if isinstance(value, dict) or not isinstance(value, bool | int | float | str | list):
        do = "numbers, texts, true, false, or lists of them"
        return Problem(what="has no form on a command line", where=where, got=str(value), do=do)
    if isinstance(value, float) and not math.isfinite(value):
        return Problem(what="is no finite number", where=where, got=str(value), do="a number")
    quoted = isinstance(value, str) and len(value) > 1 and value[0] == value[-1] and value[0] in "'\""
    written = str(value).replace("\\'", "") if quoted or isinstance(value, list) else str(value)
    if "\\" in written:
        do = "a value without backslashes, except before a quote inside quotes"
        return Problem(what="has a backslash, which Hydra would take for its own", where=where, got=str(value), do=do)
    if not isinstance(value, str):
        return None
    for sign, meaning in (
        ("=", "a second assignment"),
        (",", "several values"),
        ("\n", "two lines"),
        ("${", "a reference"),
    ):
        if sign in value and not quoted and value[0] + value[-1:] not in ("[]", "{}"):
            written = value.replace("'", "\\'")
            do = f"quote it for Hydra inside YAML's quotes: \"'{written}'\""
            return Problem(what=f"would be read as {meaning} by Hydra", where=where, got=value, do=do)
    if not value.strip() or value.lower() in ("null", "none"):
        return Problem(what="would be read as nothing", where=where, got=repr(value), do="another value")
    if _is_number(value):
        do = _number_advice(value)
        return Problem(what="is a text, and looks like a number", where=where, got=repr(value), do=do)
    return None


def _number_advice(text: str) -> str:
    mantissa, _, exponent = f"{float(text):.6g}".partition("e")
    mantissa += "" if "." in mantissa or not exponent else ".0"
    written = f"{mantissa}e{exponent}" if exponent else mantissa
    return f"write {written} without quotes; YAML takes an exponent without a dot (1e-4) for a text"


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _range(name: str, body: dict[str, Any], where: str) -> Parameter | Problem:
    low, high, step = body.get("min"), body.get("max"), body.get("q")
    for key, value in (("min", low), ("max", high), ("q", step)):
        if isinstance(value, str) and _is_number(value):
            do = _number_advice(value)
            return Problem(what="is a text, and looks like a number", where=f"{where}.{key}", got=repr(value), do=do)
        if (value is None and key != "q") or isinstance(value, bool | str | list):
            allowed = "a number; or values: [...], or value: ..."
            return Problem(what="is no range", where=f"{where}.{key}", got=str(value), allowed=allowed)
    bounds = [bound for bound in (low, high) if isinstance(bound, int | float)]
    whole = all(isinstance(bound, int) for bound in bounds)
    said = body.get("distribution", "int_uniform" if whole else "uniform")
    if said not in RANGES:
        do = INSTEAD.get(str(said)) or nearest(str(said), DISTRIBUTIONS) or "uniform"
        allowed = ", ".join(DISTRIBUTIONS)
        return Problem(what="is not offered", where=f"{where}.distribution", got=str(said), allowed=allowed, do=do)
    return _bounded(Parameter(name=name, distribution=str(said), min=bounds[0], max=bounds[1], step=step), where, whole)


def _bounded(parameter: Parameter, where: str, whole: bool) -> Parameter | Problem:
    low, high, said, step = parameter.min, parameter.max, parameter.distribution, parameter.step
    got = f"{low} to {high}"
    if not low < high:
        return Problem(what="is an empty range", where=where, got=got, allowed="min below max", do="or value: ...")
    if said == "int_uniform" and not whole:
        return Problem(what="needs whole numbers", where=where, got=got, do="write both without a dot, or uniform")
    if said == "log_uniform_values" and low <= 0:
        return Problem(what="has no logarithm", where=f"{where}.min", got=str(low), allowed="above 0", do="raise it")
    if said == "q_uniform":
        step = 1 if step is None else step
        if not 0 < step <= high - low:
            return Problem(
                what="is no step of this range",
                where=f"{where}.q",
                got=str(step),
                allowed=f"above 0, up to {high - low:g}",
            )
    elif step is not None:
        return Problem(
            what=f"has no effect with {said}", where=f"{where}.q", got=str(step), do="q_uniform, or remove it"
        )
    else:
        step = 1 if said == "int_uniform" else None
    return Parameter(name=parameter.name, distribution=said, min=low, max=high, step=step)
