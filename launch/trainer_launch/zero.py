"""DeepSpeed's config of a layout, made of the plan and of nothing else.

The ranks hand it to DeepSpeed, the driver writes the same text to ``launch/deepspeed.json``. Nobody writes one by hand:
batch size, accumulation or clipping that are said in two places sooner or later say two things.
"""

import json
from dataclasses import dataclass
from typing import Literal

Stage = Literal[1, 2, 3]

BUCKET = 50_000_000
"""Elements that DeepSpeed reduces or gathers at once; 200 MB in float32, a tenth of its own default."""


class ZeroError(ValueError):
    """A ``ZeroSpec`` that DeepSpeed has no layout for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ZeroSpec:
    """What of the training ``world_size`` ranks divide among themselves (ZeRO, arXiv 1910.02054).

    ``stage`` 1: optimizer state; 2: and gradients; 3: and weights. ``accumulation``: micro-batches of a rank in an
    optimizer step. ``keep_whole_below``: stage 3 leaves weights of at most so many elements whole on every rank.
    ``offload_optimizer``: masters and optimizer state are in main memory and the CPU takes the step;
    ``offload_parameters``: what stage 3 divides of the weights is in main memory.

    Raises:
        ZeroError: a number out of range, or weights to offload that are not divided.
    """

    stage: Stage
    world_size: int
    accumulation: int
    keep_whole_below: int = 0
    offload_optimizer: bool = False
    offload_parameters: bool = False

    def __post_init__(self) -> None:
        for name, value, least in (
            ("world_size", self.world_size, 1),
            ("accumulation", self.accumulation, 1),
            ("keep_whole_below", self.keep_whole_below, 0),
        ):
            if value < least:
                raise ZeroError(f"{name} must be at least {least}, got {value}")
        if self.stage != 3 and (self.offload_parameters or self.keep_whole_below):
            raise ZeroError(f"only stage 3 divides weights, got stage {self.stage}")


def deepspeed_config(spec: ZeroSpec) -> dict[str, object]:
    """The config for ``deepspeed.initialize``.

    No precision and no clipping are in it: weights are float32 and the module computes under autocast by itself, and
    the norm is what the strategy takes before it clips. No optimizer either: it is the same AdamW as everywhere.
    """
    zero: dict[str, object] = {
        "stage": spec.stage,
        "contiguous_gradients": True,
        "reduce_scatter": True,
        "reduce_bucket_size": BUCKET,
        "allgather_bucket_size": BUCKET,
    }
    if spec.stage == 3:
        zero |= {
            "stage3_param_persistence_threshold": spec.keep_whole_below,
            # Give a layer back as soon as it was used; the defaults keep up to 10^9 weights gathered.
            "stage3_max_reuse_distance": 0,
            "stage3_max_live_parameters": 2 * BUCKET,
            "stage3_prefetch_bucket_size": BUCKET,
            "memory_efficient_linear": False,
        }
    elif not spec.offload_optimizer:
        zero["compute_grad_norm"] = False
    if spec.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    if spec.offload_parameters:
        zero["offload_param"] = {"device": "cpu", "pin_memory": True}
    return {
        "train_batch_size": spec.world_size * spec.accumulation,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": spec.accumulation,
        # Off, because the strategy clips; left out it would be 1.
        "gradient_clipping": 0.0,
        "communication_data_type": "fp32",
        # torch's AdamW steps on the CPU as well; DeepSpeed's own would be compiled at the first start.
        "zero_force_ds_cpu_optimizer": False,
        "timers": {"throughput": {"enabled": False}},
        "zero_optimization": zero,
    }


def deepspeed_json(spec: ZeroSpec) -> str:
    """The text of ``deepspeed.json``."""
    return json.dumps(deepspeed_config(spec), indent=2) + "\n"
