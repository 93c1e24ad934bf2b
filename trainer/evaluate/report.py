"""The picture of a run: its training and validation loss, drawn from ``metrics.jsonl`` alone.

It is drawn from the record and not from memory, so that it can be drawn again, of any run, also of one that is still
going on. A step whose loss is no number is marked, not left out in silence.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import msgspec
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, LogLocator, MaxNLocator, NullFormatter

from trainer.errors import DataError
from trainer.paths import write_atomic

TRAINING = "#1f5fa8"
VALIDATION = "#c8501e"
FAULT = "#b00020"
GRID = "#e3e6ea"
TEXT = "#333840"
LOG_SCALE_ABOVE = 8.0
"""Largest over smallest smoothed loss from which a logarithmic axis shows more than a linear one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LossCurve:
    """What ``metrics.jsonl`` says of the loss (nats per target token), by optimizer step.

    ``steps`` and ``losses`` are the training steps with a finite loss; ``faults`` the steps without one.
    """

    steps: list[int]
    losses: list[float]
    validation_steps: list[int]
    validation_losses: list[float]
    faults: list[int]


def read_curve(metrics: Path) -> LossCurve:
    """Read the losses of a run.

    Raises:
        DataError: the file is missing, a line is not a step, or no step has a finite loss.
    """
    curve = LossCurve(steps=[], losses=[], validation_steps=[], validation_losses=[], faults=[])
    try:
        lines = metrics.read_bytes().splitlines()
    except OSError as error:
        raise _unreadable(metrics, str(error)) from error
    for number, line in enumerate(lines, 1):
        try:
            values = msgspec.json.decode(line, type=dict[str, object])
            step, loss, validation = int(str(values["step"])), _number(values["loss"]), values.get("val_loss")
        except (msgspec.DecodeError, KeyError, ValueError) as error:
            raise _unreadable(metrics, f"line {number}: {error}") from error
        if math.isfinite(loss):
            curve.steps.append(step)
            curve.losses.append(loss)
        else:
            curve.faults.append(step)
        if validation is not None and math.isfinite(_number(validation)):
            curve.validation_steps.append(step)
            curve.validation_losses.append(_number(validation))
    if not curve.steps:
        raise _unreadable(metrics, f"{len(lines)} steps, none with a finite loss")
    return curve


def smooth(values: Sequence[float], width: float) -> list[float]:
    """Average around each value with Gaussian weights of standard deviation ``width`` (in values).

    Centred and not a running average: a line that trails behind a falling loss would show training above validation
    where it is not.
    """
    series = np.asarray(values, dtype=np.float64)
    reach = max(1, math.ceil(3 * width))
    weights = np.exp(-0.5 * (np.arange(-reach, reach + 1) / max(width, 1e-9)) ** 2)
    total = np.convolve(series, weights)[reach : reach + len(series)]
    return (total / np.convolve(np.ones_like(series), weights)[reach : reach + len(series)]).tolist()


def loss_curve(metrics: Path, picture: Path, *, title: str) -> None:
    """Draw ``metrics`` (``metrics.jsonl``) into ``picture`` (PNG, 1600 x 900 pixels).

    Raises:
        DataError: as ``read_curve``.
    """
    curve = read_curve(metrics)
    # Figure without pyplot: no global state, no display, safe in any thread.
    figure = Figure(figsize=(8.0, 4.5), dpi=200, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    _draw_training(axes, curve)
    _draw_validation(axes, curve)
    for step in curve.faults:
        axes.axvline(step, color=FAULT, linewidth=1.0, linestyle=":", label=_once(axes, "loss not finite"))
    _dress(axes, title)
    buffer = BytesIO()
    # Without the version of matplotlib in it, the same run gives the same bytes.
    figure.savefig(buffer, format="png", metadata={"Software": None})
    write_atomic(picture, buffer.getvalue())


def _draw_training(axes: Axes, curve: LossCurve) -> None:
    """Every step, thin; the smoothed line, bold."""
    smoothed = smooth(curve.losses, width=len(curve.losses) / 40)
    axes.plot(curve.steps, curve.losses, color=TRAINING, alpha=0.28, linewidth=1.0, label="training, each step")
    marker = "o" if len(curve.steps) == 1 else None
    axes.plot(curve.steps, smoothed, color=TRAINING, linewidth=2.2, marker=marker, label="training, smoothed")
    shown = smoothed + curve.validation_losses
    if min(shown) > 0 and max(shown) / min(shown) > LOG_SCALE_ABOVE and min(curve.losses) > 0:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 3.0, 5.0)))
        axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))
        axes.yaxis.set_minor_formatter(NullFormatter())


def _draw_validation(axes: Axes, curve: LossCurve) -> None:
    """Points joined by a line; the legend says the best one."""
    if not curve.validation_steps:
        return
    best, step = min(zip(curve.validation_losses, curve.validation_steps, strict=True))
    axes.plot(
        curve.validation_steps,
        curve.validation_losses,
        color=VALIDATION,
        linewidth=1.6,
        marker="o",
        markersize=5.5,
        markeredgecolor="white",
        label=f"validation (best {best:.3f} at step {step})",
    )


def _dress(axes: Axes, title: str) -> None:
    """Title, axes, grid, legend: nothing that competes with the lines."""
    axes.set_title(title, loc="left", color=TEXT, fontsize=12, fontweight="bold")
    axes.set_xlabel("optimizer step", color=TEXT)
    axes.set_ylabel("loss (nats per target token)", color=TEXT)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes.tick_params(colors=TEXT, which="both", labelsize=9)
    axes.grid(visible=True, color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(GRID)
    axes.legend(frameon=False, labelcolor=TEXT, loc="upper right")


def _once(axes: Axes, label: str) -> str:
    """``label`` the first time, then a name that the legend leaves out."""
    _, labels = axes.get_legend_handles_labels()
    return f"_{label}" if label in labels else label


def _number(value: object) -> float:
    """A figure of the record: a number, or the text that stands for one that is not finite."""
    if isinstance(value, (int, float, str)):
        return float(value)
    raise ValueError(f"{value!r} is not a number")


def _unreadable(metrics: Path, got: str) -> DataError:
    return DataError(
        "cannot draw a loss curve",
        where=str(metrics),
        got=got,
        allowed='one JSON object per optimizer step, with at least "step" and "loss"',
        do="train the run, or look at its logs",
    )
