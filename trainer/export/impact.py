"""What a model cost, for its card: a section for people, and the entry that the Hub shows (``co2_eq_emissions``)."""

from trainer.cost import text as cost_text
from trainer.cost.sums import Cost
from trainer.export.lineage import Lineage
from trainer.export.markdown import bullets, escape, table


def emissions(lineage: Lineage) -> dict[str, str | float] | None:
    """The header's entry, in grams; None where the energy is unknown, because a part of it would pass for the whole."""
    cost = lineage.cost
    if cost is None or cost.co2_g is None:
        return None
    return {
        "emissions": float(f"{cost.co2_g:.4g}"),
        "source": f"trimtab: energy {cost_text.known_by(cost.together)}; {cost_text.factors_text(cost.factors)}",
        "training_type": "fine-tuning",
        "hardware_used": hardware(lineage, cost),
    }


def hardware(lineage: Lineage, cost: Cost) -> str:
    """What computed, with its number."""
    machine = lineage.environment
    if cost.gpus:
        return f"{lineage.world_size} x {', '.join(cost.gpus)}"
    return f"{machine.cpu}, {machine.cores} cores"


def impact(lineage: Lineage) -> str:
    """All that the run used, from its first start to this card."""
    cost = lineage.cost
    if cost is None:
        return "Not recorded."
    tokens = f"{lineage.training.tokens:,} trained"
    if lineage.training.targets:
        tokens += f", {lineage.training.targets:,} of them carried loss"
    rows = [
        ["hardware", escape(hardware(lineage, cost))],
        ["GPU-hours", cost_text.hours(cost.together.gpu_seconds)],
        ["CPU core-hours", cost_text.hours(cost.together.core_seconds)],
        ["tokens", tokens],
        ["energy of the devices", cost_text.energy(cost.together)],
        ["CO2 equivalent", f"{cost_text.co2(cost)} ({escape(cost_text.factors_text(cost.factors))})"],
    ]
    if cost.price is not None:
        rows.append(["price", f"{cost.price:,.2f}, at {cost.factors.price_per_gpu_hour:g} a GPU-hour"])
    note = (
        "Of all starts and stages together, those that were repeated too; without memory, disks, network, and the "
        "making of the machines."
    )
    notes = cost_text.warnings(cost)
    return "\n\n".join([table(["", ""], rows), note, *([bullets([escape(one) for one in notes])] if notes else [])])
