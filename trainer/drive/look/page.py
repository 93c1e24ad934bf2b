"""Runs as one HTML file that needs nothing else: no script, no font, no picture, no request of any kind.

The page forbids itself to load anything (its content security policy), so that not even data that escaped our care
could call home. It can be mailed, put beside a paper, or opened from a disk that is not on any network.
"""

from collections.abc import Sequence
from datetime import UTC, datetime

from trainer import __version__
from trainer.cost.sums import SOURCES
from trainer.drive.look import compare, tables
from trainer.drive.look.chart import Series, chart, look_of
from trainer.drive.look.gather import RunLook
from trainer.drive.look.html import Markup, Part, element, join
from trainer.drive.look.style import SHEET
from trainer.drive.look.tables import Table

POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
TITLES = {
    "loss": "training loss, nats per token that carries loss",
    "val_loss": "validation loss, nats per token that carries loss",
    "grad_norm": "norm of the gradient, before clipping",
    "lr": "learning rate",
    "tokens_per_second": "tokens per second",
}


def page_of_one(look: RunLook, *, now: datetime) -> str:
    """Curves, throughput, stages, evaluation by slice, worst answers, checkpoints and cost of one run."""
    worst = tables.worst_table(look)
    return document(
        f"Run {look.label}",
        [look.state, *look.job, str(look.folder.root)],
        [
            section("Curves", charts_of_one(look)),
            section("Throughput and stages", drawn(tables.training_table(look), tables.stage_table(look))),
            section("Evaluation", drawn(tables.result_table(look), *tables.slice_tables(look), worst)),
            drawn(tables.checkpoint_table(look), tables.cost_table(look), level="h2"),
        ],
        [
            "This page holds answers and references of test rows: treat it as you treat the data." if worst else "",
            *_foot(now, with_cost=look.cost is not None),
        ],
    )


def page_of_several(looks: Sequence[RunLook], *, now: datetime) -> str:
    """Figures with intervals, row-by-row comparison, overlaid curves, what differs, and cost, of several runs."""
    names = compare.names_of(looks)
    return document(
        f"{len(looks)} runs beside each other",
        [join([element("span", class_=f"key {look_of(number)}"), name]) for number, name in enumerate(names)],
        [
            drawn(compare.figure_table(looks), compare.paired_table(looks), level="h2"),
            section("Curves", charts_of_several(looks, names)),
            drawn(*compare.config_tables(looks), compare.cost_comparison(looks), level="h2"),
        ],
        _foot(now, with_cost=any(look.cost is not None for look in looks)),
    )


def document(title: str, lines: Sequence[Part], sections: Sequence[Markup], foot: Sequence[str]) -> str:
    """A whole page: a heading with ``lines`` under it, ``sections``, and ``foot`` in small print."""
    head = [
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=POLICY),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("title", title),
        element("style", Markup(SHEET)),
    ]
    body = [
        element("header", element("h1", title), [element("p", line) for line in lines]),
        element("main", sections),
        element("footer", [element("p", line) for line in foot if line]),
    ]
    return f"<!doctype html>\n{element('html', element('head', head), element('body', body), lang='en')}\n"


def _foot(now: datetime, *, with_cost: bool) -> list[str]:
    written = now.astimezone(UTC).strftime("%Y-%m-%d %H:%M UTC")
    by = f"Written by trimtab {__version__} on {written}; runs are shown as they were then."
    return [by, *(f"Default {source}." for source in SOURCES if with_cost)]


def section(title: str, inside: Markup) -> Markup:
    """A part of the page under a heading; nothing where there is nothing to show."""
    return element("section", element("h2", title), inside) if inside else inside


def charts_of_one(look: RunLook) -> Markup:
    """Training and validation loss together, every other figure alone."""
    losses = [
        Series(name, look.curves[key], number)
        for number, (name, key) in enumerate((("training", "loss"), ("validation", "val_loss")))
        if key in look.curves
    ]
    charts = [chart("loss, nats per token that carries loss", losses)] if losses else []
    charts += [
        chart(_title(name), [Series(name, curve, 0)])
        for name, curve in look.curves.items()
        if name not in ("loss", "val_loss")
    ]
    return element("div", charts, class_="charts") if charts else Markup("")


def charts_of_several(looks: Sequence[RunLook], names: Sequence[str]) -> Markup:
    """A chart for each figure, with a line for each run that has it."""
    figures = dict.fromkeys(figure for look in looks for figure in look.curves)
    first = [name for name in ("val_loss", "loss") if name in figures]
    charts = [
        chart(
            _title(figure),
            [
                Series(name, look.curves[figure], number)
                for number, (look, name) in enumerate(zip(looks, names, strict=True))
                if figure in look.curves
            ],
        )
        for figure in [*first, *(name for name in figures if name not in first)]
    ]
    return element("div", charts, class_="charts") if charts else Markup("")


def _title(name: str) -> str:
    return TITLES.get(name, f"validation: {name.removeprefix('val_')}" if name.startswith("val_") else name)


def drawn(*given: Table | None, level: str = "h3") -> Markup:
    """Those tables that there are, under headings of ``level``."""
    return join([_table(table, level) for table in given if table is not None])


def _table(table: Table, level: str) -> Markup:
    """Rows whose first cell is their head; a scroll bar of its own where it is wider than the screen."""
    heads = element("thead", element("tr", [element("th", column, scope="col") for column in table.columns]))
    rows = [
        element("tr", element("th", row[0], scope="row"), [element("td", cell, **_kind(cell)) for cell in row[1:]])
        for row in table.rows
    ]
    return join(
        [
            element(level, table.title),
            element(
                "div",
                element("table", heads if any(table.columns) else "", element("tbody", rows)),
                class_="scroll",
                tabindex="0",
                role="region",
                aria_label=table.title,
            ),
            [element("p", note, class_="note") for note in table.notes],
        ]
    )


def _kind(cell: str) -> dict[str, str]:
    return {"class_": "bad"} if cell.startswith("DAMAGED") else {}
