"""The two pictures of a sweep as PNG, for reports and mails: which parameter matters, and where good trials lie."""

import math
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from trainer.paths import write_atomic
from trainer.sweeps.distributions import Parameter
from trainer.sweeps.space import SearchSpace
from trainer.sweeps.study import Trial

BAR = "#1f5fa8"
TEXT = "#333840"
DPI = 120


def draw_importances(path: Path, importances: Mapping[str, float], metric: str) -> None:
    """Bars, the most important parameter on top; a word instead where it cannot be told."""
    figure = Figure(figsize=(7.0, 1.2 + 0.45 * max(1, len(importances))), layout="constrained")
    axes: Axes = figure.subplots()
    axes.set_title(f"Importance for {metric}", loc="left", color=TEXT)
    if importances:
        names = list(importances)[::-1]
        bars = axes.barh(names, [importances[name] for name in names], color=BAR)
        axes.bar_label(bars, fmt="%.2f", padding=3)
        axes.set_xlim(0.0, 1.12 * max(importances.values()))
        axes.set_xlabel("share of the variance")
    else:
        axes.text(0.5, 0.5, "too few complete trials, or all alike", ha="center", va="center", color=TEXT)
        axes.set_axis_off()
    _save(figure, path)


def draw_parallel(path: Path, trials: Sequence[Trial], space: SearchSpace) -> None:
    """A line per complete trial through its parameters to its value; darker is better."""
    done = [trial for trial in trials if trial.state == "complete" and trial.value is not None]
    parameters = [parameter for parameter in space.parameters if not parameter.constant]
    figure = Figure(figsize=(2.4 + 1.8 * len(parameters), 4.2), layout="constrained")
    axes: Axes = figure.subplots()
    axes.set_title(f"{len(done)} trials: {space.metric.goal} {space.metric.name}", loc="left", color=TEXT)
    axes.set_xticks(range(len(parameters) + 1), [*(parameter.name for parameter in parameters), space.metric.name])
    axes.set_yticks([])
    axes.set_xlim(-0.3, len(parameters) + 0.5)
    values = [float(trial.value or 0.0) for trial in done]
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    shades = colormaps["viridis" if space.metric.goal == "minimize" else "viridis_r"]
    for trial, value in zip(done, values, strict=True):
        places = [_height(parameter, trial.params.get(parameter.name)) for parameter in parameters]
        share = (value - low) / (high - low) if high > low else 0.5
        places.append(share)
        axes.plot(range(len(places)), places, color=shades(share), alpha=0.8, linewidth=1.4)
    for place, parameter in enumerate(parameters):
        _label_axis(axes, place, [(_height(parameter, value), value) for value in parameter.examples])
    _label_axis(axes, len(parameters), [(0.0, low), (1.0, high)] if high > low else [(0.5, low)])
    _save(figure, path)


def _label_axis(axes: Axes, place: int, marks: Sequence[tuple[float, object]]) -> None:
    axes.axvline(place, color=TEXT, linewidth=0.8)
    for height, value in marks:
        text = f"{value:.3g}" if isinstance(value, float) else str(value)
        axes.annotate(
            text, (place, height), xytext=(4, 0), textcoords="offset points", fontsize=8, va="center", color=TEXT
        )


def _height(parameter: Parameter, value: object) -> float:
    """Where a value stands on the axis of its parameter, from 0 to 1."""
    if parameter.values:
        texts = [str(entry) for entry in parameter.values]
        return texts.index(str(value)) / max(1, len(texts) - 1)
    number = float(value) if isinstance(value, int | float) else parameter.min
    low, high = float(parameter.min), float(parameter.max)
    if parameter.log:
        number, low, high = math.log(number), math.log(low), math.log(high)
    return (number - low) / (high - low)


def _save(figure: Figure, path: Path) -> None:
    drawn = BytesIO()
    FigureCanvasAgg(figure)
    figure.savefig(drawn, format="png", dpi=DPI)
    write_atomic(path, drawn.getvalue())
