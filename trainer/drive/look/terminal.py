"""Runs on a terminal: the tables as they are, and curves of block characters."""

from collections.abc import Sequence
from itertools import pairwise
from statistics import fmean

from trainer import console
from trainer.drive.look import compare, tables, wording
from trainer.drive.look.gather import RunLook
from trainer.drive.look.tables import Table

BARS = "▁▂▃▄▅▆▇█"
WIDTH = 60
"""Columns of a curve."""


def show_one(look: RunLook) -> None:
    """State, stages, curves, throughput, scores, checkpoints and cost of one run."""
    console.say(f"run {look.label} in {look.folder.root}: {look.state}")
    for line in look.job:
        console.say(line)
    print_table(tables.stage_table(look))
    training = tables.training_table(look)
    if training is not None:
        curves = [
            [name, f"{sparkline(curve.values)}  {wording.span(curve)}"]
            for name, curve in look.curves.items()
            if name != "tokens_per_second"
        ]
        print_table(Table(title=training.title, columns=training.columns, rows=[*curves, *training.rows]))
    for table in (tables.result_table(look), tables.checkpoint_table(look), tables.cost_table(look)):
        if table is not None:
            print_table(table)


def show_several(looks: Sequence[RunLook]) -> None:
    """What differs in the configs of several runs, their figures and cost, a column each, and a curve of each."""
    for table in compare.config_tables(looks):
        print_table(table)
    print_table(compare.figure_table(looks))
    for table in (compare.paired_table(looks), compare.cost_comparison(looks)):
        if table is not None:
            print_table(table)
    for look, name in zip(looks, compare.names_of(looks), strict=True):
        curve = look.curves.get("val_loss", look.curves.get("loss"))
        if curve is not None:
            console.say(f"{sparkline(curve.values)}  {wording.span(curve)}  {name}")


def sparkline(values: Sequence[float], width: int = WIDTH) -> str:
    """``values`` as at most ``width`` bars, each the mean of its share of them, from the lowest to the highest."""
    count = min(width, len(values))
    edges = [place * len(values) // count for place in range(count + 1)]
    means = [fmean(values[start:stop]) for start, stop in pairwise(edges)]
    low, high = min(means), max(means)
    if high == low:
        return BARS[0] * count
    return "".join(BARS[min(len(BARS) - 1, int((mean - low) / (high - low) * len(BARS)))] for mean in means)


def print_table(table: Table) -> None:
    """A table and what there is to know of it."""
    console.table(table.columns, table.rows, title=table.title)
    for note in table.notes:
        console.note(f"  {note}")
