"""How figures are written, the same in the terminal, on a page and in the closing tables of a run."""

from trainer.drive.look.scores import Figure
from trainer.intervals import Interval, Paired
from trainer.markers import Marker
from trainer.records import Curve

DIGITS = 4
NONE = "-"


def share(value: float) -> str:
    """Four decimals."""
    return f"{value:.4f}"


def scored(figure: Figure | None) -> str:
    """``0.8148 (0.7534 to 0.8637)``: a figure and between what it lies, where that is known."""
    if figure is None:
        return NONE
    return share(figure.value) + (f" ({between(figure.interval)})" if figure.interval is not None else "")


def between(interval: Interval) -> str:
    """``0.7534 to 0.8637``."""
    return f"{interval.low:.4f} to {interval.high:.4f}"


def verdict(paired: Paired) -> str:
    """``+0.0423 (-0.0100 to 0.0940), p 0.12``: what the rows of two runs say."""
    p = "p < 0.0001" if paired.p < 0.0001 else f"p {paired.p:.2g}"
    return f"{paired.difference:+.4f} ({between(paired.interval)}), {p}"


def told_apart(paired: Paired) -> str:
    """The same in a word."""
    if not paired.differs:
        return "not told apart"
    return "better" if paired.difference > 0 else "worse"


def span(curve: Curve) -> str:
    """First and last value, and between which two it was."""
    first, last, low, high = curve.values[0], curve.values[-1], min(curve.values), max(curve.values)
    return f"{first:.{DIGITS}g} -> {last:.{DIGITS}g}, between {low:.{DIGITS}g} and {high:.{DIGITS}g}"


def summary_text(marker: Marker) -> str:
    """``steps 40, loss 0.31``: what a stage has to say about itself."""
    return ", ".join(
        f"{name.replace('_', ' ')} {f'{value:.4g}' if isinstance(value, float) else value}"
        for name, value in marker.summary.items()
    )
