"""What the loop knows between two steps, apart from weights and optimizer: with those, a run goes on bit by bit."""

from dataclasses import dataclass, field

from trainer.train.guard import Best, LossHistory
from trainer.train.metrics import StepRecord


@dataclass(slots=True, kw_only=True)
class TrainState:
    """Everything the loop knows besides weights and optimizer; the same on every rank.

    ``step``: optimizer steps done or passed over. ``tokens``: seen so far, without padding. ``skipped``: float16 steps
    that overflowed and were not taken. ``faults``: steps not taken because of a value that was not finite, or a spike;
    ``faults_in_row``: the last of them without a good one between. ``rollbacks``: returns to a checkpoint. ``pending``:
    the record of the last step when the run was stopped before its validation. ``stopped_early``: patience ran out,
    there is nothing more to train. ``scaler``: of the float16 loss scale.
    """

    step: int = 0
    tokens: int = 0
    skipped: int = 0
    faults: int = 0
    faults_in_row: int = 0
    rollbacks: int = 0
    losses: LossHistory = field(default_factory=LossHistory)
    best: Best = field(default_factory=Best)
    pending: StepRecord | None = None
    stopped_early: bool = False
    scaler: dict[str, float] = field(default_factory=dict[str, float])
