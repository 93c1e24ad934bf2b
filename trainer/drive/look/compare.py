"""Several runs beside each other: what differs in their configs, and what came of it. Columns are runs."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import TypeVar

from trainer.console import format_seconds
from trainer.cost import text as cost_text
from trainer.drive.look import wording
from trainer.drive.look.gather import TUNED, RunLook
from trainer.drive.look.scores import Figure, hold_against
from trainer.drive.look.tables import INTERVALS, Table
from trainer.plan import RunPlan, flat_identity, flatten
from trainer.redaction import redact

T = TypeVar("T")
LONGEST = 40
SAME = "nothing differs"


def names_of(looks: Sequence[RunLook]) -> list[str]:
    """A name for each run; folders tell runs of one identity apart."""
    labels = [look.label for look in looks]
    return [
        label if labels.count(label) == 1 else f"{label} ({look.folder.root})"
        for label, look in zip(labels, looks, strict=True)
    ]


def config_tables(looks: Sequence[RunLook]) -> list[Table]:
    """What training depends on and what it does not, where it is not the same in all runs."""
    plans, names = [look.plan for look in looks], ["", *names_of(looks)]
    trained = differing([flat_identity(plan) for plan in plans])
    other = differing([others_of(plan) for plan in plans])
    empty = [[SAME, *("" for _ in plans)]]
    return [
        Table(title="What differs in training", columns=names, rows=trained or empty),
        Table(
            title="What differs besides",
            columns=names,
            rows=other or empty,
            notes=["where and how the runs ran, and what was done afterwards: training does not depend on it"],
        ),
    ]


def others_of(plan: RunPlan) -> dict[str, object]:
    """Everything of a plan that its identity leaves out, by its dotted name."""
    known = flat_identity(plan)
    config = {name: value for name, value in flatten(asdict(plan.config)).items() if name not in known}
    placed = {
        "plan.device": plan.device,
        "plan.ranks": plan.world_size,
        "plan.layout": plan.strategy,
        "plan.checkpointing": plan.checkpointing,
        "plan.version": plan.code_version,
    }
    return {**config, **placed}


def differing(parts: Sequence[dict[str, object]]) -> list[list[str]]:
    """Name and values of what is not the same in all ``parts``."""
    names = dict.fromkeys(name for part in parts for name in part)
    return [
        [name, *(_short(part.get(name)) for part in parts)]
        for name in names
        if any(part.get(name) != parts[0].get(name) for part in parts)
    ]


def _short(value: object) -> str:
    text = "null" if value is None else redact(str(value))
    if len(text) <= LONGEST:
        return text
    return f"...{text[3 - LONGEST :]}" if text.startswith("/") else f"{text[: LONGEST - 3]}..."


def figure_table(looks: Sequence[RunLook]) -> Table:
    """State, losses, speed, time, and the scores of the tuned models, with their intervals."""
    tuned = [look.evaluated.get(TUNED) for look in looks]
    metrics = dict.fromkeys(name for one in tuned if one is not None for name in one.figures)
    rows = [
        ["state", *(look.state for look in looks)],
        ["steps", *(_or_none(look.trained, lambda trained: str(trained.steps)) for look in looks)],
        ["lowest validation loss", *(_of_curve(look, "val_loss", min) for look in looks)],
        ["last loss", *(_of_curve(look, "loss", lambda values: values[-1]) for look in looks)],
        ["tokens per second", *(_speed(look) for look in looks)],
        ["time of all stages", *(_stage_time(look) for look in looks)],
        ["test rows", *(_or_none(one, lambda found: str(found.scores.rows)) for one in tuned)],
    ]
    rows += [
        [f"test {name}", *(wording.scored(None if one is None else one.figures.get(name)) for one in tuned)]
        for name in metrics
    ]
    known = any(figure.interval for one in tuned if one is not None for figure in one.figures.values())
    return Table(title="Figures", columns=["", *names_of(looks)], rows=rows, notes=[INTERVALS] if known else [])


def paired_table(looks: Sequence[RunLook]) -> Table | None:
    """Each run against the first one, row by row of the same test; None where none was tested."""
    first, names = looks[0], names_of(looks)
    rows = [
        [name, *against(first, look)]
        for name, look in zip(names[1:], looks[1:], strict=True)
        if TUNED in look.evaluated and TUNED in first.evaluated
    ]
    if not rows:
        return None
    columns = ["run", "exact match less that of the first", "right only here", "right only there", ""]
    notes = ["McNemar's exact test on the rows in which two runs differ; one seed each: another seed may say otherwise"]
    if len(rows) > 1:
        notes.append(f"each of {len(rows)} runs is tested by itself: one in twenty alike runs looks better or worse")
    return Table(title=f"Row by row against {names[0]}", columns=columns, rows=rows, notes=notes)


def against(first: RunLook, second: RunLook) -> list[str]:
    """Difference, rows that changed either way, and the verdict; or why there is none."""
    if not first.test or not second.test:
        return [wording.NONE, "", "", "not compared: no record of the frozen test rows"]
    if first.test != second.test:
        return [wording.NONE, "", "", "not compared: other test rows"]
    paired = hold_against(first.evaluated[TUNED].answers, second.evaluated[TUNED].answers)
    if paired is None:
        return [wording.NONE, "", "", "not compared: answers are missing, or of other rows"]
    return [wording.verdict(paired), str(paired.gained), str(paired.lost), wording.told_apart(paired)]


def cost_comparison(looks: Sequence[RunLook]) -> Table | None:
    """What the runs have cost so far; None where no run wrote it down."""
    costs = [look.cost for look in looks]
    if not any(costs):
        return None
    rows = [
        ["GPU-hours", *(_or_none(cost, lambda found: cost_text.hours(found.together.gpu_seconds)) for cost in costs)],
        [
            "CPU core-hours",
            *(_or_none(cost, lambda found: cost_text.hours(found.together.core_seconds)) for cost in costs),
        ],
        ["tokens trained", *(_or_none(look.trained, lambda found: f"{found.tokens:,}") for look in looks)],
        ["energy", *(_or_none(cost, lambda found: cost_text.energy(found.together)) for cost in costs)],
        ["CO2 equivalent", *(_or_none(cost, cost_text.co2) for cost in costs)],
    ]
    if any(cost is not None and cost.price is not None for cost in costs):
        rows.append(
            ["price", *(f"{cost.price:,.2f}" if cost and cost.price is not None else wording.NONE for cost in costs)]
        )
    return Table(title="Cost", columns=["", *names_of(looks)], rows=rows, notes=_notes(looks))


def _notes(looks: Sequence[RunLook]) -> list[str]:
    """Factors once where they are the same, and what else is to be known of any run."""
    costs = [look.cost for look in looks if look.cost is not None]
    factors = list(dict.fromkeys(cost_text.factors_text(cost.factors) for cost in costs))
    warnings = dict.fromkeys(note for cost in costs for note in cost_text.warnings(cost))
    mixed = ["the runs have different factors: see each of them"] if len(factors) > 1 else factors
    return [*mixed, *warnings]


def _or_none(value: T | None, text: Callable[[T], str]) -> str:
    return wording.NONE if value is None else text(value)


def _of_curve(look: RunLook, name: str, choose: Callable[[list[float]], float]) -> str:
    curve = look.curves.get(name)
    return wording.NONE if curve is None else wording.scored(Figure(choose(curve.values)))


def _speed(look: RunLook) -> str:
    speed = None if look.trained is None else look.trained.speed
    return wording.NONE if speed is None else f"{speed:,.0f}"


def _stage_time(look: RunLook) -> str:
    return format_seconds(sum(marker.seconds for marker in look.stages.values() if marker is not None))
