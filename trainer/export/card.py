"""``python -m trainer.export.card RUN_DIR``: lineage and model card of a run, at the end of everything.

The card is a function of ``lineage.json`` and of nothing else: every number in it can be traced, and a card never says
more than was measured. Text that comes from data (labels, slices, names of files) is escaped.
"""

import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from huggingface_hub import EvalResult, ModelCardData

from trainer.console import run_and_report, say
from trainer.errors import RunError
from trainer.export.comparison import TensorComparison, rounding_price, tensor_evidence
from trainer.export.figures import HUB_METRIC, METRICS, figure, main_metric, number
from trainer.export.impact import emissions, impact
from trainer.export.limitations import TUNED, limitations
from trainer.export.lineage import (
    CARD,
    LINEAGE,
    Lineage,
    collect_lineage,
    read,
    read_lineage,
    write_lineage,
)
from trainer.export.loading import adapter_snippet, merged_snippet
from trainer.export.markdown import bullets, code, escape, table
from trainer.markers import Marker, write_marker
from trainer.paths import RunFolder, write_atomic
from trainer.plan import load_plan, stage_inputs
from trainer.samples import Prepared

Kind = Literal["run", "adapter", "merged"]
BEFORE = {"zero_shot": "base model, zero-shot"}
HUB_ID = {"builtin:smollm2-135m-instruct": "HuggingFaceTB/SmolLM2-135M-Instruct"}
"""Where a built-in base comes from; the Hub shows the card below that model."""
USES = {
    "classification": "Naming the class of a text, one of the labels below, for texts like those it was trained on.",
    "extraction": "Copying a stated piece of information out of a text, for texts like those it was trained on.",
    "summary": "Short summaries and headings, for texts like those it was trained on.",
    "chat": "Answering the kinds of questions it was trained on.",
    "text": "Continuing texts like those it was trained on.",
}


def render_card(lineage: Lineage, kind: Kind) -> str:
    """The card of the run folder, of ``adapter/`` or of ``merged/``, as Markdown with the Hub's YAML header."""
    sections = [
        f"# {title(lineage)}",
        summary(lineage),
        "![Training and validation loss](loss.png)" if kind == "run" else "",
        "## Results\n\n" + results(lineage),
        "## How to load it\n\n" + loading(lineage, kind),
        "## Intended use\n\n" + intended_use(lineage),
        "## Limitations\n\n" + bullets(limitations(lineage)),
        "## Training\n\n" + training(lineage),
        "## Environmental impact\n\n" + impact(lineage),
        "## Data\n\n" + data(lineage),
        "## Licences\n\n" + licences(lineage),
        "## Checks of the export\n\n" + checks(lineage),
        "## Where it comes from\n\n" + provenance(lineage),
    ]
    body = "\n\n".join(section for section in sections if section)
    return f"---\n{header(lineage, kind).to_yaml()}\n---\n\n{body}\n"


def header(lineage: Lineage, kind: Kind) -> ModelCardData:
    """What the Hub reads: base, licence, library, metrics of the tuned model."""
    lora = lineage.config.method.name == "lora"
    adapter = kind == "adapter" or (kind == "run" and lora)
    base = hub_id(lineage)
    tuned = lineage.evaluations.get(TUNED)
    measured = {} if tuned is None else {name: tuned.metrics[name] for name in HUB_METRIC if name in tuned.metrics}
    return ModelCardData(
        base_model=base,
        base_model_relation=None if base is None else ("adapter" if adapter else "finetune"),
        library_name="peft" if adapter else "transformers",
        pipeline_tag="text-generation",
        license=lineage.base.license or None,
        tags=["trimtab", "lora" if lora else "full-fine-tuning", lineage.config.task.name],
        datasets=hub_datasets(lineage) or None,
        metrics=list(dict.fromkeys(HUB_METRIC[name] for name in measured)) or None,
        model_name=title(lineage) if measured else None,
        eval_results=[
            EvalResult(
                task_type="text-generation",
                task_name=lineage.config.task.name,
                dataset_type="frozen-test-split",
                dataset_name=f"{lineage.name}, frozen test split of {tuned.rows} rows",
                dataset_split="test",
                dataset_revision=lineage.data.splits_sha256,
                metric_type=HUB_METRIC[name],
                metric_name=METRICS[name],
                metric_value=round(value, 6),
            )
            for name, value in measured.items()
            if tuned is not None
        ]
        or None,
        co2_eq_emissions=emissions(lineage),
    )


def title(lineage: Lineage) -> str:
    """Base and run in one line."""
    return f"{base_title(lineage)}, tuned: {escape(lineage.name)}"


def base_title(lineage: Lineage) -> str:
    """The base's name without where it lies."""
    return escape((hub_id(lineage) or lineage.base.name).rsplit("/", 1)[-1].removeprefix("builtin:"))


def hub_id(lineage: Lineage) -> str | None:
    """The base's id on the Hub, or None for a folder."""
    return HUB_ID.get(lineage.base.name, lineage.base.name if lineage.base.revision else None)


def hub_datasets(lineage: Lineage) -> list[str]:
    """Hub ids of the data."""
    places = [source.location for source in lineage.data.sources if source.location.startswith("hub:")]
    names = [place.removeprefix("hub:").split(":")[0] for place in places]
    return list(dict.fromkeys("/".join(name.split("/")[:2]) for name in names))


def summary(lineage: Lineage) -> str:
    """What it is, in two sentences with the main figures."""
    method = lineage.config.method
    how = f"LoRA of rank {method.rank}" if method.name == "lora" else "full fine-tuning"
    train = lineage.data.splits["train"]
    text = (
        f"{base_title(lineage)} ({lineage.base.parameters:,} parameters), tuned with {how} on {train.rows:,} rows for "
        f"the task `{lineage.config.task.name}`."
    )
    tuned, before = lineage.evaluations.get(TUNED), lineage.evaluations.get("zero_shot")
    name = main_metric(tuned)
    if tuned is None or name is None:
        return text
    text += f" On {tuned.rows} held-out rows its {METRICS[name]} is {tuned.metrics[name]:.3f}"
    if before is not None and name in before.metrics:
        text += f"; that of the base model without tuning is {before.metrics[name]:.3f}"
    return text + "."


def results(lineage: Lineage) -> str:
    """Before and after on the same rows."""
    columns = [who for who in (*BEFORE, TUNED) if who in lineage.evaluations]
    if not columns:
        return "Not measured: the run had no test rows."
    found = [lineage.evaluations[who] for who in columns]
    rows = [
        [METRICS[name], *(figure(name, evaluation) for evaluation in found)]
        for name in METRICS
        if any(name in evaluation.metrics for evaluation in found)
    ]
    if any(evaluation.loss is not None for evaluation in found):
        rows.append(["loss (nats per answer token)", *(number(evaluation.loss) for evaluation in found)])
    note = (
        f"Frozen test split (sha256 `{lineage.data.splits_sha256[:16]}`), {found[-1].rows} rows, greedy decoding, at "
        f"most {lineage.config.task.max_new_tokens} new tokens. ± is one standard error of a share of that many rows."
    )
    return note + "\n\n" + table(["", *(BEFORE.get(who, "this model") for who in columns)], rows)


def loading(lineage: Lineage, kind: Kind) -> str:
    """Code that runs as it stands."""
    parts: list[str] = []
    if kind in ("run", "adapter") and "adapter" in lineage.exports:
        folder = "export/adapter" if kind == "run" else "."
        parts.append(adapter_snippet(lineage, folder))
    if kind in ("run", "merged") and "merged" in lineage.exports:
        folder = "export/merged" if kind == "run" else "."
        parts.append(merged_snippet(lineage, folder))
    return "\n\n".join(parts) or "Nothing was exported (`export.adapter=false export.merged=false`)."


def intended_use(lineage: Lineage) -> str:
    """What it was trained for, in the words of the task, and the labels."""
    text = USES[lineage.config.task.name]
    if lineage.config.task.name == "classification" and lineage.data.labels:
        text += "\n\nLabels: " + ", ".join(f"`{code(label)}`" for label in lineage.data.labels) + "."
    if lineage.config.data.system:
        text += f"\n\nSystem prompt it was trained with: `{code(lineage.config.data.system)}`"
    return text + "\n\nOther uses were not measured. An answer is a suggestion for a person who can judge it."


def training(lineage: Lineage) -> str:
    """Settings and what happened."""
    config, record = lineage.config, lineage.training
    method, optim = config.method, config.optim
    rows = [["method", method.name]]
    if method.quantize:
        rows.append(["base in training", f"linear layers in 4 bits ({method.quantize})"])
    if method.name == "lora":
        rows += [
            ["LoRA", f"rank {method.rank}, alpha {method.alpha:g}, dropout {method.dropout:g}"],
            [
                "adapted modules",
                escape(", ".join(method.targets)) + (f", layers `{method.layers}`" if method.layers else ""),
            ],
        ]
    rows += [
        ["optimizer", f"AdamW, betas {optim.betas[0]:g} and {optim.betas[1]:g}, weight decay {optim.weight_decay:g}"],
        ["learning rate", f"{optim.lr:g}, {optim.schedule}, warm-up {optim.warmup:.0%} of the steps"],
        ["steps", f"{record.steps:,} ({record.epochs:.2f} epochs, {record.tokens:,} tokens)"],
        ["packing", f"{config.packing.tokens:,} tokens per pack, documents isolated, `{config.packing.algorithm}`"],
        ["compute dtype", f"{lineage.dtype} ({escape(lineage.dtype_reason)})"],
        ["processes", f"{lineage.world_size} ({lineage.strategy})"],
        ["seed", str(config.run.seed)],
        ["speed", f"{record.tokens_per_second:,.0f} tokens/s (median step)"],
        ["last training loss", number(record.last_loss)],
    ]
    if record.best_validation_loss is not None:
        rows.append(["best validation loss", f"{number(record.best_validation_loss)} at step {record.best_step}"])
    if "train" in lineage.stages:
        rows.append(["training time", f"{lineage.stages['train'].seconds:,.0f} s"])
    machine = lineage.environment
    rows.append(["hardware", escape(", ".join(machine.gpus) or f"{machine.cpu}, {machine.cores} cores")])
    return table(["", ""], rows)


def data(lineage: Lineage) -> str:
    """Sources with hashes and attribution, splits, and what was left out."""
    sources = [
        [
            escape(source.name),
            escape(source.location),
            f"{source.rows:,}",
            source.license or "not stated",
            f"`{source.sha256[:16]}`",
        ]
        for source in lineage.data.sources
    ]
    splits = [
        [name, f"{split.rows:,}", f"{split.tokens:,}", f"{split.targets:,}", f"{split.longest:,}"]
        for name, split in lineage.data.splits.items()
    ]
    parts = [
        table(["source", "where", "rows", "licence", "sha256"], sources),
        *(escape(text) for text in dict.fromkeys(source.attribution for source in lineage.data.sources) if text),
        table(["split", "rows", "tokens", "learnt or scored tokens", "longest"], splits),
    ]
    if lineage.data.dropped:
        parts.append(
            "Left out:\n\n" + bullets([f"{one.count:,} rows: {escape(one.reason)}" for one in lineage.data.dropped])
        )
    return "\n\n".join(parts)


def licences(lineage: Lineage) -> str:
    """Of the base and of the data; what follows for these weights is said carefully."""
    base = lineage.base
    found = [
        f"Base model: {escape(base.license) if base.license else 'its folder states none'}."
        + (f" {escape(base.attribution)}" if base.attribution else "")
    ]
    for source in lineage.data.sources:
        found.append(f"Data `{code(source.name)}`: {escape(source.license) if source.license else 'not stated'}.")
    found.append("These weights are a derivative of the base model: its licence applies to them.")
    return bullets(list(dict.fromkeys(found)))


def checks(lineage: Lineage) -> str:
    """What the fresh process found."""
    found: list[str] = []
    for one in lineage.verification:
        readers = "transformers and peft" if one.name == "adapter" else "transformers"
        ties = f" ({one.near_ties} after a near tie)" if one.near_ties else ""
        found.append(
            f"`{one.name}/`, loaded in a fresh process by plain {readers}: {one.equal} of {one.prompts} recorded "
            f"answers equal token by token{ties}; log-probabilities differ by at most {one.difference:.3g} nats "
            f"(allowed {one.tolerance:g}){_tensors(one.tensors)}."
            + (f" In memory, {rounding_price(one.rounding)}." if one.rounding else "")
        )
    if lineage.config.export.nothing:
        return "There is no export."
    return bullets(found) if found else "The export was not verified."


def _tensors(found: TensorComparison | None) -> str:
    if found is None:
        return ""
    if found.not_compared:
        return f"; the tensors were not compared ({escape(found.not_compared)})"
    return f"; {tensor_evidence(found)}"


def provenance(lineage: Lineage) -> str:
    """Run, base, code, packages."""
    environment, base = lineage.environment, lineage.base
    code_text = f"trimtab {environment.code.version}"
    if environment.code.commit:
        changed = " with local changes" if environment.code.dirty else ""
        code_text += f", commit `{environment.code.commit[:12]}`{changed}"
    packages = ", ".join(f"{name} {version}" for name, version in environment.packages.items())
    return table(
        ["", ""],
        [
            ["run", f"`{lineage.identity}`, {lineage.created}"],
            [
                "base model",
                f"{escape(base.name)}{f' at {base.revision}' if base.revision else ''}, sha256 `{base.sha256[:16]}`",
            ],
            ["code", code_text],
            ["Python", escape(f"{environment.python}, {environment.platform}")],
            ["packages", escape(packages)],
            ["everything else", f"`{LINEAGE}` beside this file: full hashes, config, figures by slice, files"],
        ],
    )


def write_cards(folder: RunFolder) -> None:
    """Render the cards of a run and its exports from its ``lineage.json``.

    Raises:
        RunError: there is no readable lineage.
    """
    lineage = read_lineage(folder.lineage_json)
    write_atomic(folder.card, render_card(lineage, "run"))
    kinds: tuple[tuple[Kind, Path], ...] = (("adapter", folder.adapter), ("merged", folder.merged))
    for kind, export in kinds:
        if export.is_dir():
            write_atomic(export / LINEAGE, folder.lineage_json.read_bytes())
            write_atomic(export / CARD, render_card(lineage, kind))


def main(arguments: Sequence[str]) -> int:
    """Write lineage and cards of the run in the folder that is the only argument, and the stage's marker."""
    if len(arguments) != 1:
        raise RunError("one run folder is needed", got=" ".join(arguments), allowed="RUN_DIR")
    started, now = time.monotonic(), datetime.now(UTC)
    folder = RunFolder(Path(arguments[0]))
    plan = load_plan(folder.plan_json.read_bytes())
    lineage = collect_lineage(folder, plan, read(folder.prepared_json, Prepared), now=now)
    write_lineage(folder.lineage_json, lineage)
    write_cards(folder)
    say(f"model card: {folder.card}")
    write_marker(
        folder,
        Marker(
            stage="card",
            inputs=stage_inputs(plan, "card"),
            seconds=time.monotonic() - started,
            finished=now.isoformat(timespec="seconds"),
        ),
    )
    return 0


if __name__ == "__main__":
    sys.exit(run_and_report(lambda: main(sys.argv[1:])))
