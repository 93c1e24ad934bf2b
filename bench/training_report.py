"""What a study of packers says: a table, the same for machines, and a picture.

Runs of one seed share data and initial weights, so packers are compared within a seed; means over seeds alone would
hide a difference that is smaller than that between seeds.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf, sqrt
from pathlib import Path
from statistics import mean, stdev

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

BUCKETS = {"long": ">= 512", "middle": "64-511", "short": "< 64"}
"""Names of lengths in tokens."""
CRITICAL = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)
"""Student's t that chance passes once in twenty times, for 2, 3, ... 10 pairs; more are taken like 10."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One finished run.

    ``key``: of its study. ``documents``, ``tokens``: trained on, the tokens over all epochs. ``fill``: share of all
    packs in use. ``variance``: over steps, of the mean log-length of a step's documents. ``before``, ``loss``: nats per
    held-out target before and after training, of which there are ``held_out``; ``by_length`` the latter by bucket.
    """

    key: str
    packer: str
    seed: int
    documents: int
    tokens: int
    steps: int
    fill: float
    variance: float
    before: float
    loss: float
    by_length: dict[str, float]
    held_out: int
    seconds: float


def by_packer(results: Sequence[Result]) -> dict[str, list[Result]]:
    """The runs of each packer in the order of seeds."""
    found: dict[str, list[Result]] = {}
    for result in sorted(results, key=lambda result: result.seed):
        found.setdefault(result.packer, []).append(result)
    ordered = dict.fromkeys(result.packer for result in results)
    return {packer: found[packer] for packer in ordered}


def spread(values: Sequence[float]) -> float:
    """Standard deviation; 0 of a single one."""
    return stdev(values) if len(values) > 1 else 0.0


def paired(results: Sequence[Result]) -> dict[str, list[float]]:
    """Loss of every packer but the first, less that of the first, seed by seed."""
    first, *others = by_packer(results).items()
    base = {run.seed: run.loss for run in first[1]}
    return {packer: [run.loss - base[run.seed] for run in runs if run.seed in base] for packer, runs in others}


def verdict(differences: Sequence[float]) -> str:
    """Whether the mean of ``differences`` is more than chance makes of so many pairs, in words."""
    pairs = len(differences)
    if pairs < 2:
        return "one seed tells nothing"
    error = spread(differences) / sqrt(pairs)
    t = abs(mean(differences)) / error if error else inf
    critical = CRITICAL[min(pairs - 2, len(CRITICAL) - 1)]
    words = f"t = {t:.1f} of {pairs} pairs, chance passes {critical} once in twenty"
    return f"{words}: {'a difference' if t > critical else 'NOT decided'}"


def table(results: Sequence[Result]) -> str:
    """Both tables as text."""
    runs = by_packer(results)
    lines = [
        f"{'packer':13}{'fill':>8}{'steps':>7}{'before':>9}{'held-out loss (sd)':>21}"
        + "".join(f"{words:>9}" for words in BUCKETS.values())
        + f"{'var. of log-length':>20}"
    ]
    for packer, of in runs.items():
        losses = [run.loss for run in of]
        row = (
            f"{packer:13}{100 * mean(run.fill for run in of):7.2f}%{of[0].steps:7}{mean(run.before for run in of):9.4f}"
        )
        row += f"{f'{mean(losses):.4f} ({spread(losses):.4f})':>21}"
        for name in BUCKETS:
            values = [run.by_length[name] for run in of if name in run.by_length]
            row += f"{mean(values):9.3f}" if values else f"{'-':>9}"
        lines.append(row + f"{mean(run.variance for run in of):20.3f}")
    base = next(iter(runs))
    for packer, differences in paired(results).items():
        lower = sum(difference > 0 for difference in differences)
        share = mean(differences) / mean(run.loss for run in runs[base])
        lines.append(
            f"\n{packer} - {base}, seed by seed: "
            + " ".join(f"{difference:+.4f}" for difference in differences)
            + f"\n  mean {mean(differences):+.4f} (sd {spread(differences):.4f}), ratio of losses {1 + share:.4f}; "
            + f"{base} is lower in {lower} of {len(differences)}\n  {verdict(differences)}"
        )
    return "\n".join(lines) + "\n"


def summary(results: Sequence[Result]) -> dict[str, object]:
    """The numbers of the table, for JSON."""
    return {
        "packers": {
            packer: {
                "fill": mean(run.fill for run in of),
                "steps": of[0].steps,
                "tokens": of[0].tokens,
                "variance": mean(run.variance for run in of),
                "before": [run.before for run in of],
                "loss": [run.loss for run in of],
                "by_length": [run.by_length for run in of],
            }
            for packer, of in by_packer(results).items()
        },
        "paired": paired(results),
    }


def plot(results: Sequence[Result], path: Path, title: str) -> None:
    """A PNG: one line per seed from packer to packer, so that a difference within a seed is a slope."""
    runs = by_packer(results)
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    places = range(len(runs))
    for seed in sorted({run.seed for run in results}):
        losses = [next((run.loss for run in of if run.seed == seed), float("nan")) for of in runs.values()]
        axes.plot(places, losses, marker="o", linewidth=1, label=f"seed {seed}")
    axes.scatter(places, [mean(run.loss for run in of) for of in runs.values()], marker="_", s=900, color="black")
    axes.set_xticks(list(places), list(runs))
    axes.set_xlim(-0.4, len(runs) - 0.6)
    axes.set_ylabel("held-out loss, nats per token")
    axes.yaxis.set_major_locator(MaxNLocator(6))
    axes.set_title(title, fontsize="small")
    axes.legend(fontsize="small", frameon=False)
    # Without the version of matplotlib in it, the same study gives the same bytes.
    figure.savefig(path, dpi=120, metadata={"Software": None})
