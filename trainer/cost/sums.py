"""From what a run used to what that means: GPU-hours, energy, CO2 and money, by factors that are stated with the sums.

Pure arithmetic over the lines of ``ledger.py``. Nothing is looked up by the name of a device: what a GPU draws is
measured, or said by the user, or unknown. What is measured and what is estimated are added up apart.

Not counted: main memory, disks, network and fans but for their share in ``pue``; making the machine; GPUs that a batch
system held while they waited for ``prepare``, ``verify`` or the card.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from trainer.cost.ledger import Account, Spell

SECONDS_PER_HOUR = 3600.0
JOULES_PER_KWH = 3.6e6
SOURCES = (
    "cpu_watts_per_core 4.11: median of server processors at full load, per hardware thread (Cloud Carbon Footprint, "
    "from SPECpower results)",
    "pue 1.56: mean of data centres in 2024 (Uptime Institute, Global Data Center Survey 2024)",
    "carbon_g_per_kwh 473: world mean of 2024, CO2 equivalent (Ember, Global Electricity Review 2025)",
)
"""Where the default factors come from."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Factors:
    """As ``config.cost``, whose fields these are: W, W per core, a ratio, g of CO2 equivalent per kWh, money per h."""

    gpu_watts: float | None = None
    cpu_watts_per_core: float = 4.11
    pue: float = 1.56
    carbon_g_per_kwh: float = 473.0
    price_per_gpu_hour: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Spent:
    """Sums of some lines, of one stage or of a run.

    ``seconds``: wall time that processes worked, each counted for itself; ``starts``: of rank 0, or of the one process.
    ``gpu_seconds``, ``core_seconds``: of all devices. Energy in J, before ``pue``: ``measured`` is what devices told,
    ``estimated`` what is assumed of the rest. ``unknown_gpu_seconds``: of which nothing is known.
    """

    seconds: float = 0.0
    starts: int = 0
    gpu_seconds: float = 0.0
    core_seconds: float = 0.0
    measured: float = 0.0
    estimated: float = 0.0
    unknown_gpu_seconds: float = 0.0

    @property
    def joules(self) -> float:
        """Energy of the devices in J, measured and estimated."""
        return self.measured + self.estimated


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What a run has cost so far: ``stages`` in the order in which they first appear, and all together.

    ``kwh``: of the devices, ``kwh_building``: that times ``pue``, of which ``co2_g`` is made. Both None when the energy
    of some GPU time is unknown: part of a sum would pass for the whole. ``price`` is None without a price per hour.
    ``whole_sockets``: CPU energy was read off sockets, so that it has the work of others on the machine in it.
    """

    stages: dict[str, Spent]
    together: Spent
    factors: Factors
    gpus: list[str] = field(default_factory=list[str])
    whole_sockets: bool = False
    sampled_power: bool = False
    unreadable: int = 0

    @property
    def gpu_hours(self) -> float:
        """GPUs times hours for which the run held them."""
        return self.together.gpu_seconds / SECONDS_PER_HOUR

    @property
    def core_hours(self) -> float:
        """CPU time in hours, of all threads of all processes."""
        return self.together.core_seconds / SECONDS_PER_HOUR

    @property
    def kwh(self) -> float | None:
        """Energy of the devices."""
        return None if self.together.unknown_gpu_seconds else self.together.joules / JOULES_PER_KWH

    @property
    def kwh_building(self) -> float | None:
        """Energy with its share of cooling and conversion."""
        return None if self.kwh is None else self.kwh * self.factors.pue

    @property
    def co2_g(self) -> float | None:
        """Grams of CO2 equivalent."""
        return None if self.kwh_building is None else self.kwh_building * self.factors.carbon_g_per_kwh

    @property
    def measured_share(self) -> float:
        """Share of the energy that devices told themselves, 0 to 1; 0 where there is no energy."""
        return self.together.measured / self.together.joules if self.together.joules else 0.0

    @property
    def price(self) -> float | None:
        """GPU-hours times their price."""
        each = self.factors.price_per_gpu_hour
        return None if each is None else self.gpu_hours * each


def totals(cost: Cost) -> dict[str, float | None]:
    """The sums of ``cost`` by name and unit, for a record: hours, kWh, grams, money; None: unknown."""
    return {
        "gpu_hours": cost.gpu_hours,
        "core_hours": cost.core_hours,
        "kwh": cost.kwh,
        "kwh_building": cost.kwh_building,
        "co2_g": cost.co2_g,
        "measured_share": cost.measured_share,
        "price": cost.price,
    }


def cost_of(account: Account, factors: Factors) -> Cost | None:
    """Add up the lines of a run; None where there are none: nothing was written down, which is not "nothing spent"."""
    spells = account.spells
    if not spells:
        return None
    watts = mean_watts(spells)
    watts = factors.gpu_watts if watts is None else watts
    of_stage = {name: [spell for spell in spells if spell.stage == name] for name in _stages(spells)}
    return Cost(
        stages={name: add_up(lines, watts, factors.cpu_watts_per_core) for name, lines in of_stage.items()},
        together=add_up(spells, watts, factors.cpu_watts_per_core),
        factors=factors,
        gpus=sorted({spell.gpu for spell in spells if spell.gpu}),
        whole_sockets=any(spell.cpu_joules for spell in spells),
        sampled_power=any(spell.gpu_meter == "power" for spell in spells),
        unreadable=account.unreadable,
    )


def mean_watts(spells: Iterable[Spell]) -> float | None:
    """W that a GPU of the run drew while it was measured; None where none was."""
    told = [(spell.gpu_joules, spell.gpus * spell.seconds) for spell in spells if spell.gpu_joules is not None]
    seconds = sum(held for _, held in told)
    return sum(joules for joules, _ in told) / seconds if seconds else None


def add_up(spells: Sequence[Spell], gpu_watts: float | None, cpu_watts_per_core: float) -> Spent:
    """The sums of ``spells``; GPU time without a measurement counts with ``gpu_watts``, with None as unknown."""
    silent = sum(spell.gpus * spell.seconds for spell in spells if spell.gpu_joules is None)
    computed = sum(spell.core_seconds for spell in spells if spell.cpu_joules is None)
    return Spent(
        seconds=sum(spell.seconds for spell in spells),
        starts=len({spell.began for spell in spells if spell.rank <= 0}),
        gpu_seconds=sum(spell.gpus * spell.seconds for spell in spells),
        core_seconds=sum(spell.core_seconds for spell in spells),
        measured=sum((spell.gpu_joules or 0.0) + (spell.cpu_joules or 0.0) for spell in spells),
        estimated=computed * cpu_watts_per_core + silent * (gpu_watts or 0.0),
        unknown_gpu_seconds=silent if gpu_watts is None else 0.0,
    )


def _stages(spells: Iterable[Spell]) -> list[str]:
    return list(dict.fromkeys(spell.stage for spell in sorted(spells, key=lambda spell: (spell.began, spell.rank))))
