"""The tables of a run. Each is plain text in rows: the terminal prints it and a page draws it, neither computes."""

from dataclasses import dataclass, field

from trainer.console import format_seconds, gigabytes
from trainer.cost import text as cost_text
from trainer.cost.sums import Cost
from trainer.drive.look import wording
from trainer.drive.look.gather import BEFORE, TUNED, RunLook
from trainer.drive.look.scores import hold_against, slices_of, worst_answers
from trainer.markers import STAGES
from trainer.metric_names import MAIN, METRICS

WORST = 10
"""So many wrong answers are shown."""
CLIPPED = 300
"""Characters of a text."""
SLICES = 8
"""Values of a column that are shown, the weakest first."""
INTERVALS = "in brackets: 95 % intervals (Wilson for shares of rows, normal for token F1); other figures have none"


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """``columns`` are heads ("" where a column needs none), ``rows`` as wide as them, ``notes`` what to know of it."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    notes: list[str] = field(default_factory=list[str])


def stage_table(look: RunLook) -> Table:
    """Every stage: its time and figures, or that it was not done; the sum last."""
    done = {row[0]: row for row in time_rows(look)}
    rows = [done.get(stage, [stage, wording.NONE, "not done"]) for stage in STAGES]
    return Table(title="Stages", columns=["stage", "time", ""], rows=[*rows, done["together"]])


def time_rows(look: RunLook) -> list[list[str]]:
    """Stage, wall time, and the figures of its marker; the sum last."""
    markers = [marker for marker in look.stages.values() if marker is not None]
    rows = [[marker.stage, format_seconds(marker.seconds), wording.summary_text(marker)] for marker in markers]
    return [*rows, ["together", format_seconds(sum(marker.seconds for marker in markers)), ""]]


def training_table(look: RunLook) -> Table | None:
    """Speed, steps and memory; None before the first step."""
    trained = look.trained
    if trained is None:
        return None
    rows = [["steps, epochs, tokens", f"{trained.steps}, {trained.epochs:.2f}, {trained.tokens:,}"]]
    if trained.targets:
        rows.append(["tokens that carried loss", f"{trained.targets:,}"])
    if trained.speed is not None:
        count = len(look.curves["tokens_per_second"].steps)
        rows.append(["tokens per second", f"{trained.speed:,.0f} (median of {count} steps)"])
    rows.append(["peak memory", f"{trained.memory_gb:.2f} GB on rank 0"])
    rows.append(["time of a step", _shares(trained.shares, trained.steps)])
    return Table(title="Training", columns=["", ""], rows=rows)


def _shares(parts: dict[str, float], steps: int) -> str:
    whole = sum(parts.values())
    if not whole or not steps:
        return wording.NONE
    shares = ", ".join(f"{name} {100 * value / whole:.1f} %" for name, value in parts.items())
    return f"{whole / steps:.3g} s on average: {shares}"


def result_table(look: RunLook) -> Table | None:
    """Every figure of the tuned model beside that of the untuned one, and whether the rows tell them apart."""
    before, after = look.evaluated.get(BEFORE), look.evaluated.get(TUNED)
    if after is None:
        return None
    there = {} if before is None else before.figures
    rows = [[name, wording.scored(there.get(name)), wording.scored(value)] for name, value in after.figures.items()]
    notes = [INTERVALS] if any(figure.interval for figure in after.figures.values()) else []
    paired = None if before is None else hold_against(before.answers, after.answers)
    if paired is not None:
        notes.append(
            f"exact match, row by row: {wording.verdict(paired)} (McNemar): {paired.gained} rows are right only after, "
            f"{paired.lost} only before, of {paired.rows}"
        )
    return Table(title="Result", columns=["on the test split", "before", "after"], rows=rows, notes=notes)


def slice_tables(look: RunLook) -> list[Table]:
    """The main figure by slice, the weakest first."""
    tuned = look.evaluated.get(TUNED)
    main = None if tuned is None else next((name for name in MAIN if name in tuned.scores.metrics), None)
    if tuned is None or main is None:
        return []
    tables: list[Table] = []
    for column, values in slices_of(tuned.scores, main).items():
        rows = [
            [value, f"{int(figures.get('rows', 0)):,}", wording.share(figures[main])]
            for value, figures in values.items()
            if main in figures
        ]
        more = f", {len(rows) - SLICES} more" if len(rows) > SLICES else ""
        note = [f"the weakest first{more}; slices of few rows say little"]
        columns = [column, "test rows", METRICS.get(main, main)]
        tables.append(Table(title=f"By {column}", columns=columns, rows=rows[:SLICES], notes=note))
    return tables


def worst_table(look: RunLook) -> Table | None:
    """Wrong answers with what was expected: texts of the test set."""
    tuned = look.evaluated.get(TUNED)
    found = [] if tuned is None else worst_answers(tuned.answers, WORST)
    if tuned is None or not found:
        return None
    wrong = sum(not answer.correct for answer in tuned.answers)
    rows = [
        [one.id, clip(one.answer), clip(one.text) + ("" if one.stopped else " [cut off]"), f"{one.f1:.2f}"]
        for one in found
    ]
    note = f"{len(found)} of {wrong} wrong answers, those first that share the fewest words with their reference"
    return Table(title="Worst answers", columns=["row", "expected", "answered", "token F1"], rows=rows, notes=[note])


def clip(text: str) -> str:
    """A text short enough for a table."""
    return text if len(text) <= CLIPPED else f"{text[: CLIPPED - 3]}..."


def checkpoint_table(look: RunLook) -> Table | None:
    """Every published checkpoint, newest first."""
    rows = [
        [
            saved.name,
            ", ".join(saved.kinds) or wording.NONE,
            gigabytes(saved.bytes),
            saved.written.strftime("%Y-%m-%d %H:%M:%S"),
            saved.state,
        ]
        for saved in look.saved
    ]
    columns = ["checkpoint", "kind", "size", "written (UTC)", "state"]
    return Table(title="Checkpoints", columns=columns, rows=rows) if rows else None


def cost_table(look: RunLook) -> Table | None:
    """What each stage used, of all starts and ranks; None where nothing was written down."""
    cost = look.cost
    if cost is None:
        return None
    tokens = tokens_of(look)
    entries = [*cost.stages.items(), ("together", cost.together)]
    rows = [
        [
            name,
            str(spent.starts) if name != "together" else "",
            cost_text.hours(spent.gpu_seconds),
            cost_text.hours(spent.core_seconds),
            tokens.get(name, ""),
            cost_text.energy(spent),
        ]
        for name, spent in entries
    ]
    columns = ["stage", "starts", "GPU-hours", "CPU core-hours", "tokens", "energy"]
    return Table(title="Cost", columns=columns, rows=rows, notes=cost_notes(cost))


def tokens_of(look: RunLook) -> dict[str, str]:
    """Tokens of the stages that count them."""
    found: dict[str, str] = {}
    if look.trained is not None:
        found["train"] = f"{look.trained.tokens:,}"
        if look.trained.targets:
            found["train"] += f", {look.trained.targets:,} with loss"
    for stage, who in (("baseline", BEFORE), ("evaluate", TUNED)):
        evaluated = look.evaluated.get(who)
        if evaluated is not None and evaluated.generated:
            found[stage] = f"{evaluated.generated:,} generated"
    return found


def cost_notes(cost: Cost) -> list[str]:
    """What the sums mean, and by which factors."""
    notes = [f"CO2 equivalent: {cost_text.co2(cost)} ({cost_text.factors_text(cost.factors)})"]
    if cost.price is not None:
        notes.append(f"price: {cost.price:,.2f}, at {cost.factors.price_per_gpu_hour:g} a GPU-hour")
    return [*notes, *cost_text.warnings(cost)]
