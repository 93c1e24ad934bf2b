"""What a caller can get wrong here, in four parts: what is wrong, what was given, what is allowed, what to do.

The parts are attributes as well as text, so that the trainer can print them like its own errors. This package is a
leaf and has its own two classes; both are ``ValueError``.
"""


class KernelError(ValueError):
    """Base of the errors of this package."""

    def __init__(self, what: str, *, got: object, allowed: str, do: str) -> None:
        self.what = what
        self.got = str(got)
        self.allowed = allowed
        self.do = do
        super().__init__(f"{what}\n  got: {self.got}\n  allowed: {allowed}\n  do this: {do}")


class PackingError(KernelError):
    """Lengths, capacities, plans, schedules or batches that make no sense."""


class ArenaError(KernelError):
    """A token arena that cannot be written, is damaged, or is not the one that was asked for."""
