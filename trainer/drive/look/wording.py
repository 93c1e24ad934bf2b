"""How figures are written, the same in the terminal, on a page and in the closing tables of a run."""

from trainer.console import format_seconds
from trainer.cost import JOULES_PER_KWH, SECONDS_PER_HOUR, Cost, Spent
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


def hours(seconds: float) -> str:
    """Hours with three significant digits, however few they are."""
    return _three(seconds / SECONDS_PER_HOUR)


def kwh(joules: float) -> str:
    """Energy in kWh."""
    return _three(joules / JOULES_PER_KWH)


def energy(spent: Spent) -> str:
    """Energy of the devices and how it is known: ``0.512 kWh, measured``."""
    if spent.unknown_gpu_seconds:
        return "unknown"
    return f"{kwh(spent.joules)} kWh, {known_by(spent)}"


def known_by(spent: Spent) -> str:
    """``measured``, ``estimated``, or how much of the one."""
    if not spent.measured:
        return "estimated"
    if not spent.estimated:
        return "measured"
    return f"{100 * spent.measured / spent.joules:.0f} % measured, the rest estimated"


def co2(cost: Cost) -> str:
    """Grams or kilograms of CO2 equivalent."""
    if cost.co2_g is None:
        return "unknown"
    return f"{_three(cost.co2_g)} g" if cost.co2_g < 1000 else f"{_three(cost.co2_g / 1000)} kg"


def wall(spent: Spent) -> str:
    """Wall time of all processes together."""
    return format_seconds(spent.seconds)


def _three(value: float) -> str:
    """Three significant digits without an exponent: ``0.00123``, ``1.23``, ``1,234``."""
    if value == 0:
        return "0"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    text = f"{value:.3g}"
    return f"{value:.7f}".rstrip("0") if "e" in text else text
