"""How a cost is written, the same in the terminal, on a page, and in a model card."""

from trainer.cost.sums import JOULES_PER_KWH, SECONDS_PER_HOUR, Cost, Factors, Spent


def hours(seconds: float) -> str:
    """Hours with three significant digits, however few they are."""
    return three(seconds / SECONDS_PER_HOUR)


def energy(spent: Spent) -> str:
    """Energy of the devices and how it is known: ``0.512 kWh, measured``; small ones in Wh."""
    if spent.unknown_gpu_seconds:
        return "unknown"
    kwh = spent.joules / JOULES_PER_KWH
    return f"{three(kwh)} kWh, {known_by(spent)}" if kwh >= 0.1 else f"{three(1000 * kwh)} Wh, {known_by(spent)}"


def known_by(spent: Spent) -> str:
    """``measured``, ``estimated``, or how much of the one."""
    if not spent.measured:
        return "estimated"
    if not spent.estimated:
        return "measured"
    return f"{100 * spent.measured / spent.joules:.0f} % measured, the rest estimated"


def co2(cost: Cost) -> str:
    """Grams or kilograms of CO2 equivalent."""
    if cost.co2_g is None:
        return "unknown"
    return f"{three(cost.co2_g)} g" if cost.co2_g < 1000 else f"{three(cost.co2_g / 1000)} kg"


def factors_text(factors: Factors) -> str:
    """The factors behind a sum."""
    gpu = "" if factors.gpu_watts is None else f", {factors.gpu_watts:g} W a GPU where none was measured"
    return (
        f"{factors.carbon_g_per_kwh:g} g/kWh, pue {factors.pue:g}, {factors.cpu_watts_per_core:g} W a core where "
        f"sockets do not say{gpu}"
    )


def warnings(cost: Cost) -> list[str]:
    """What is not as exact as it looks."""
    found: list[str] = []
    if cost.together.unknown_gpu_seconds:
        unknown = hours(cost.together.unknown_gpu_seconds)
        found.append(f"of {unknown} GPU-hours nobody said what they drew: cost.gpu_watts=W gives a figure")
    if cost.whole_sockets:
        found.append("energy of processors is that of whole sockets, with what others did on them")
    if cost.sampled_power:
        found.append("some GPUs have no counter of joules: their power was read every half minute")
    if cost.unreadable:
        found.append(f"{cost.unreadable} line(s) of the ledger were left half written; what they said is not counted")
    return found


def three(value: float) -> str:
    """Three significant digits without an exponent: ``0.00123``, ``1.23``, ``1,234``."""
    if value == 0:
        return "0"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    text = f"{value:.3g}"
    return f"{value:.7f}".rstrip("0") if "e" in text else text
