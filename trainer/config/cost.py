"""The section ``cost`` of the config: by which factors a run's time becomes energy, CO2 and money."""

from dataclasses import dataclass
from typing import Annotated

from msgspec import Meta

from trainer.config.bounds import NonNegative, Positive


@dataclass(slots=True, kw_only=True)
class CostConfig:
    """Factors of the account that a run keeps of what it spends. No training depends on them: they can be changed
    afterwards."""

    gpu_watts: Positive | None = None
    """W of one GPU, where no GPU of the run says itself what it draws; null: energy and CO2 stay unknown there."""
    cpu_watts_per_core: NonNegative = 4.11
    """W of a core that computes, where the processor does not say itself. The default: median of server processors at
    full load, per hardware thread (Cloud Carbon Footprint, SPECpower results)."""
    pue: Annotated[float, Meta(ge=1.0)] = 1.56
    """Energy of the building over that of its computers. The default: mean of data centres in 2024 (Uptime Institute);
    1 for a computer in a room."""
    carbon_g_per_kwh: NonNegative = 473.0
    """Grams of CO2 equivalent per kWh of electricity. The default: world mean of 2024 (Ember, Global Electricity Review
    2025)."""
    price_per_gpu_hour: NonNegative | None = None
    """What an hour of one GPU costs, in any currency; null: no price is shown."""
