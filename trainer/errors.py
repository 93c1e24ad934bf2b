"""Every error a user can cause, and the exit code each one ends the program with.

A message has four parts: what is wrong, what was given, what is allowed, what to do. They are separate arguments, so
that no raise site can forget one and the terminal, the log and the tests print the same words.

    TrimtabError                    1   something failed
    ├── UserError                   2   the user can mend it; printed without a traceback
    │   ├── ConfigError             2   one or many problems of the composed config, reported together
    │   ├── DataError               2   a file, row, split or template
    │   ├── ModelError              2   a model folder, tokenizer or adapter
    │   └── RunError                2   the run folder: in use, of another identity, no space
    ├── TrainingFault               1   non-finite loss or gradient, self-check failed, gate missed
    ├── Interrupted                74   something outside failed (a disk, a rank); the driver makes 75 of a rank's 74
    ├── StoppedInGoodOrder         75   saved and stopped on request; the same command continues
    └── NeedsPerson                76   nothing trustworthy to continue from
"""

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches

EXIT_DONE = 0
EXIT_FAILURE = 1
EXIT_USER = 2
EXIT_AGAIN = 74
EXIT_STOPPED = 75
EXIT_NEEDS_PERSON = 76


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One thing that is wrong: ``where`` (key path, file:line), ``what``, ``got``, ``allowed``, ``do``."""

    what: str
    where: str = ""
    got: str = ""
    allowed: str = ""
    do: str = ""

    def __str__(self) -> str:
        head = f"{self.where}: {self.what}" if self.where else self.what
        parts = (("got", self.got), ("allowed", self.allowed), ("do this", self.do))
        return "\n".join([head, *(f"  {name}: {text}" for name, text in parts if text)])


class TrimtabError(Exception):
    """Base of all errors raised on purpose: ``problems`` holds their parts, ``exit_code`` is what the process gives."""

    exit_code = EXIT_FAILURE

    def __init__(self, what: str, *, where: str = "", got: object = "", allowed: str = "", do: str = "") -> None:
        self.problems: tuple[Problem, ...] = (Problem(what=what, where=where, got=str(got), allowed=allowed, do=do),)
        super().__init__(str(self.problems[0]))


class UserError(TrimtabError):
    """The user can mend it; printed without a traceback, exit 2."""

    exit_code = EXIT_USER


class ConfigError(UserError):
    """All problems found in one composed config."""

    @classmethod
    def of(cls, problems: Sequence[Problem]) -> "ConfigError":
        """One error out of ``problems`` (at least one), printed one after the other."""
        error = cls(problems[0].what)
        error.problems = tuple(problems)
        error.args = ("\n".join(str(problem) for problem in problems),)
        return error


class DataError(UserError):
    """A data file, row, split, mixture or chat template."""


class ModelError(UserError):
    """A model folder, tokenizer, adapter or attention backend."""


class RunError(UserError):
    """The run folder: in use, of another identity, read-only, no space left."""


class TrainingFault(TrimtabError):
    """Training or a check of it failed: non-finite values, self-check, gate."""


class Interrupted(TrimtabError):
    """Something outside the training failed: what was published is intact, and the same command goes on from it."""

    exit_code = EXIT_AGAIN


class StoppedInGoodOrder(TrimtabError):
    """A checkpoint was published and the run stopped because it was asked to."""

    exit_code = EXIT_STOPPED


class NeedsPerson(TrimtabError):
    """No trustworthy checkpoint: going on would lose or falsify work."""

    exit_code = EXIT_NEEDS_PERSON


def nearest(name: str, allowed: Sequence[str]) -> str:
    """``"did you mean 'x'?"`` for the nearest of ``allowed``, or ``""`` when none is near."""
    close = get_close_matches(name, allowed, n=1, cutoff=0.6)
    return f"did you mean '{close[0]}'?" if close else ""
