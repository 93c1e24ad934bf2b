"""What the terminal shows of a whole run: the plan before it, the results after it. Texts and tables, nothing else."""

from collections.abc import Sequence

from trainer import console
from trainer.config import PackingConfig
from trainer.console import gigabytes
from trainer.drive.look.gather import look_at
from trainer.drive.look.tables import Table, cost_table, result_table, time_rows
from trainer.drive.look.terminal import print_table
from trainer.drive.prepared import PreparedView, ScheduleView, Split, on_disk
from trainer.fitting import Considered, components
from trainer.markers import STAGES, Marker, read_marker
from trainer.memory import MemoryEstimate
from trainer.paths import RunFolder
from trainer.plan import RunPlan, estimate_memory, layout_of, room_for_saves

WORTH_A_WORD = 0.01
"""From this share of lost time on, the plan says what can be done about it."""
COUNTED = ("rows", "documents", "tokens", "targets", "longest")


def show_start(plan: RunPlan, folder: RunFolder, todo: Sequence[str]) -> None:
    """Name the run, its folder, and what will be done."""
    console.say(f"run {plan.name}/{plan.identity} in {folder.root}")
    skipped = [stage for stage in STAGES if read_marker(folder, stage) is not None and stage not in todo]
    if skipped:
        console.note(f"done before, with the same inputs: {', '.join(skipped)}")
    console.note(f"to do: {', '.join(todo)}")


def show_plan(
    plan: RunPlan, folder: RunFolder, prepared: PreparedView, schedule: ScheduleView, todo: list[str]
) -> None:
    """What ``plan`` prints: devices, layout, data, packs, steps, and what each stage will do."""
    console.table(["", ""], [list(row) for row in plan_rows(plan, prepared, schedule)], title="Plan")
    show_layouts(plan)
    splits = [("train", prepared.train), ("validation", prepared.validation), ("test", prepared.test)]
    console.table(["split", *COUNTED], [split_row(name, split) for name, split in splits], title="Data")
    for dropped in prepared.dropped:
        console.warn(f"{dropped.count} rows left out: {dropped.reason}")
    if prepared.truncated:
        console.warn(f"{prepared.truncated} documents were cut to the capacity")
    console.table(["stage", "what happens"], stage_rows(folder, todo), title="Stages")


def show_imagined(plan: RunPlan) -> None:
    """What ``plan`` prints for GPUs that are not here: nothing of the data, which is prepared where they are."""
    rows = [*devices_rows(plan), *memory_rows(plan, estimate_memory(plan)), *capacity_rows(plan)]
    console.table(["", ""], [list(row) for row in rows], title="Plan for GPUs that this machine does not have")
    show_layouts(plan)
    console.note("data, packs and steps are planned on the machine itself, by the same command without these fields")


def show_layouts(plan: RunPlan) -> None:
    """The layouts that were looked at, fastest first, where there was a choice."""
    if len(plan.considered) > 1:
        columns = ["layout, fastest first", "needs", "there is", ""]
        console.table(columns, [layout_row(entry) for entry in plan.considered], title="Layouts")


def layout_row(entry: Considered) -> list[str]:
    """One layout with its estimate against the memory, and why it was not taken."""
    return [entry.label, gigabytes(entry.needed), gigabytes(entry.room), entry.why_not or "taken"]


def devices_rows(plan: RunPlan) -> list[tuple[str, str]]:
    """Where the ranks are, and how they share the work."""
    reserve = (
        f", {plan.config.parallel.memory_reserve:.0%} kept in reserve" if plan.config.parallel.name == "auto" else ""
    )
    rows = [("devices", f"{plan.world_size} x {plan.device}, {plan.threads} threads each, {plan.strategy}")]
    if plan.considered:
        rows.append(("layout", f"{layout_of(plan).label}; {gigabytes(plan.considered[-1].room)} for a rank{reserve}"))
    return rows


def capacity_rows(plan: RunPlan) -> list[tuple[str, str]]:
    """How large a pack is, where the plan chose it."""
    if not plan.capacity_reason:
        return []
    return [("capacity", f"{plan.config.packing.tokens:,} tokens: {plan.capacity_reason}")]


def plan_rows(plan: RunPlan, prepared: PreparedView, schedule: ScheduleView) -> list[tuple[str, str]]:
    """Name and value of everything that is decided before the first step."""
    config = plan.config
    batch = f"{plan.batch_packs} packs = {plan.world_size} rank(s) x {plan.accumulation} micro-batches"
    return [
        ("run", f"{plan.name}/{plan.identity}"),
        ("model", f"{prepared.base.name}, {prepared.base.parameters:,} parameters"),
        ("method", method_text(plan)),
        *devices_rows(plan),
        ("dtype", f"{prepared.dtype} ({prepared.dtype_reason})"),
        ("global batch", f"{batch} of {config.packing.tokens} tokens"),
        *capacity_rows(plan),
        ("packs", f"{schedule.packs:,} in an epoch, {100 * schedule.fill:.1f} % filled"),
        ("steps", f"{schedule.steps:,} ({schedule.steps_per_epoch:.1f} in an epoch)"),
        ("tokens per step", f"{schedule.tokens_per_step:,.0f}"),
        *(
            []
            if schedule.waiting is None
            else [("waiting", waiting_text(schedule.waiting, schedule, config.packing, plan.accumulation))]
        ),
        *memory_rows(plan, estimate_memory(on_disk(plan, prepared), prepared.dtype)),
    ]


def method_text(plan: RunPlan) -> str:
    """What is trained: ``full``, or ``lora, rank 16`` and in how many bits its base is."""
    method = plan.config.method
    if method.name == "full":
        return "full"
    return f"lora, rank {method.rank}" + (f", on a base in 4 bits ({method.quantize})" if method.quantize else "")


def waiting_text(share: float, schedule: ScheduleView, packing: PackingConfig, micro_batches: int) -> str:
    """What ranks lose to the slowest one, where they wait for it, and what to do about it where it is much.

    ``share`` of the time, 0 to 1; ``micro_batches`` that a rank does in a step.
    """
    advice = "" if share < WORTH_A_WORD else "; packing.cost=time makes packs that take equally long"
    if packing.cost == "time":
        advice = (
            "" if schedule.by_time else f"; a document takes longer than a pack may, so {dealt_text(micro_batches)}"
        )
    where = "in every micro-batch" if schedule.sync == "micro" else "once per step"
    source = "the model's shape" if packing.cost_ratio is None else f"packing.cost_ratio={packing.cost_ratio:g}"
    return f"ranks wait {100 * share:.2g} % of the time for the slowest one, {where}, estimated from {source}{advice}"


def dealt_text(micro_batches: int) -> str:
    """What becomes of packs that are filled by tokens under ``packing.cost=time``."""
    if micro_batches == 1:
        return "packs are filled by tokens, and with one micro-batch a step there is nothing to deal"
    return "packs are filled by tokens, and those of a step dealt to the ranks by time"


def memory_rows(plan: RunPlan, memory: MemoryEstimate | None) -> list[tuple[str, str]]:
    """What a rank needs, and what saves need in main memory beside it."""
    return [
        ("memory of a rank", memory_text(memory)),
        *([] if memory is None else [("saves", saves_text(plan, memory))]),
    ]


def saves_text(plan: RunPlan, memory: MemoryEstimate) -> str:
    """Whether the training waits for its saves, and what they take in main memory where it does not."""
    if not plan.config.checkpoint.asynchronous:
        return "the training waits for them (checkpoint.asynchronous=false)"
    if plan.waits_for_saves:
        return f"the training waits for them: {plan.waits_for_saves}"
    copies = gigabytes(room_for_saves(plan, memory).copies)
    return f"behind the training, from copies in the main memory: {copies} on a machine"


def memory_text(memory: MemoryEstimate | None) -> str:
    """The estimate and its parts, or that there is none for this architecture."""
    if memory is None:
        return "unknown for this architecture"
    times = [("the whole model before it is cut", memory.loading), ("generating answers", memory.generating)]
    return (
        f"about {gigabytes(memory.step)}: "
        + ", ".join(f"{name} {gigabytes(size)}" for name, size in components(memory) if size)
        + "".join(f"; {name} {gigabytes(size)}" for name, size in times if size)
    )


def split_row(name: str, split: Split | None) -> list[str]:
    """One line of the table of splits; dashes for one that does not exist."""
    if split is None:
        return [name, *("-" for _ in COUNTED)]
    counts = (split.rows, split.documents, split.tokens, split.targets, split.longest)
    return [name, *(f"{count:,}" for count in counts)]


def stage_rows(folder: RunFolder, todo: Sequence[str]) -> list[list[str]]:
    """Every stage with what a run would do about it."""
    return [[stage, stage_fate(read_marker(folder, stage), stage in todo)] for stage in STAGES]


def stage_fate(marker: Marker | None, is_pending: bool) -> str:
    """Say what happens to a stage: it runs, it runs again, or it is skipped."""
    if not is_pending and marker is not None:
        return f"skipped: done {marker.finished}, nothing it depends on has changed"
    return "runs" if marker is None else f"runs again: what it depends on has changed since {marker.finished}"


def show_end(folder: RunFolder) -> None:
    """The closing tables: before and after, time per stage, what it cost, where everything is."""
    look = look_at(folder)
    times = Table(title="Time", columns=["stage", "time", ""], rows=time_rows(look))
    for table in (result_table(look), times, cost_table(look)):
        if table is not None:
            print_table(table)
    console.table(["", ""], [list(row) for row in place_rows(folder)], title="Where everything is")


def place_rows(folder: RunFolder) -> list[tuple[str, str]]:
    """What the run left, and where; only what exists."""
    places = [
        ("merged model", folder.merged),
        ("adapter", folder.adapter),
        ("model card", folder.card),
        ("lineage", folder.lineage_json),
        ("figures per step", folder.metrics_jsonl),
        ("loss curve", folder.curve_png),
        ("evaluation", folder.evaluation),
        ("checkpoints", folder.checkpoints),
        ("logs", folder.logs),
    ]
    return [(name, str(path) + _size(name, folder)) for name, path in places if path.exists()]


def _size(name: str, folder: RunFolder) -> str:
    if name != "merged model":
        return ""
    return f" ({gigabytes(sum(file.stat().st_size for file in folder.merged.rglob('*') if file.is_file()))})"
