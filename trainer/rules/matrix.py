"""Which method goes with which way of sharing the work: the cells of the table in docs/layouts.md that are refused.

A method is a name of ``conf/method``; qlora is lora with a base in 4 bits. A test plans every cell of the table; which
ones were trained stands below it.
"""

from collections.abc import Iterator
from typing import Literal

from trainer.config import Config, ParallelConfig
from trainer.errors import Problem

MethodName = Literal["full", "lora", "qlora"]

REFUSED: dict[tuple[MethodName, str], str] = {
    ("qlora", "fsdp"): "is cut by rows and gathered in another dtype, and a 4-bit weight has neither rows nor a dtype",
    ("qlora", "zero3"): "is cut into pieces that are gathered without the scales that belong to a 4-bit weight",
}
"""(method, strategy) to what would happen to the base."""


def method_of(config: Config) -> MethodName:
    """Return the method by the name of its file in ``conf/method``."""
    if config.method.name == "full":
        return "full"
    return "lora" if config.method.quantize is None else "qlora"


def matrix_rules(config: Config) -> Iterator[Problem]:
    """Yield a method that this way of sharing the work cannot train, and what does not go with 4 bits."""
    method, parallel = method_of(config), config.parallel
    if (method, parallel.name) in REFUSED:
        yield _refusal(config, parallel)
    if method == "qlora" and config.model.compile:
        yield Problem(
            what="was not tried with a base in 4 bits",
            where="model.compile",
            got=f"true with method.quantize={config.method.quantize}",
            allowed="false, or null",
            do="remove it, or method=lora",
        )


def _refusal(config: Config, parallel: ParallelConfig) -> Problem:
    return Problem(
        what=f"cannot hold a base in 4 bits: under {parallel.name} it {REFUSED[(method_of(config), parallel.name)]}",
        where="parallel.name",
        got=f"{parallel.name} with method.quantize={config.method.quantize}",
        allowed="auto, ddp, zero1, zero2",
        do="parallel=ddp (the base is small in 4 bits), or method=lora",
    )
