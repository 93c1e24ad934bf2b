"""What the fresh process found out about one export folder; ``export/verification.json`` holds one per folder."""

from dataclasses import dataclass

VERIFICATION = "verification.json"
MEAN_SHARE = 0.1
"""The mean difference may be this share of the largest allowed one."""
LARGE_ROUNDING = 1.0
"""Nats from which on rounding is warned of; the built-in job has 0.1, full fine-tuning 0.4."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorComparison:
    """The files of a merged model against base plus adapter.

    ``compared``: tensors, ``adapted``: those of them with an adapter; ``steps``: largest difference, in distances
    between neighbouring numbers of the stored dtype. ``not_compared``: why it was impossible, else "".
    """

    compared: int
    adapted: int
    steps: float
    not_compared: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rounding:
    """What storing a model in 16 bits changed, measured in memory before anything was written.

    ``difference``, ``mean``: largest and mean difference (nats) from the trained model's log-probabilities along its
    own ``answers`` golden answers; ``same_answers``: how many of them the rounded model gives itself, token by token.
    """

    difference: float
    mean: float
    answers: int
    same_answers: int

    @property
    def is_large(self) -> bool:
        """Whether a user should hear of it: another answer, or more than most right exports show."""
        return self.same_answers < self.answers or self.difference > LARGE_ROUNDING


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """One folder against the model in memory that it was written from: for ``merged`` that one's weights are rounded.

    ``difference``, ``mean``: largest and mean difference of a log-probability; ``near_ties``: answers that differ
    from a pair of tokens on whose log-probabilities are closer than the tolerance; ``base_difference`` and
    ``base_mean``: the same two for the base without the adapter (None where it was not measured). ``tensors``: for a
    model that an adapter was merged into; ``rounding``: for every whole model (None for others).
    """

    name: str
    prompts: int
    equal: int
    near_ties: int
    stopped: int
    difference: float
    mean: float
    tolerance: float
    base_difference: float | None
    base_mean: float | None
    tensors: TensorComparison | None = None
    rounding: Rounding | None = None

    @property
    def tells_apart(self) -> bool:
        """Whether the base alone would have been refused. False also where it was not measured."""
        if self.base_difference is None or self.base_mean is None:
            return False
        return self.base_difference > self.tolerance or self.base_mean > self.tolerance * MEAN_SHARE


def describe(comparison: Comparison) -> str:
    """One line for people."""
    control = ""
    if comparison.base_difference is not None:
        control = f"; base without it {comparison.base_difference:.3g}"
    ties = f", {comparison.near_ties} after a near tie" if comparison.near_ties else ""
    return (
        f"{comparison.name}: {comparison.equal} of {comparison.prompts} golden answers equal{ties}, "
        f"{comparison.stopped} stop by themselves; log-probabilities differ by at most {comparison.difference:.3g} "
        f"(mean {comparison.mean:.2g}, allowed {comparison.tolerance:g}{control})"
        + _tensors(comparison.tensors)
        + _rounding(comparison.rounding)
    )


def _tensors(found: TensorComparison | None) -> str:
    if found is None:
        return ""
    if found.not_compared:
        return f"; tensors not compared: {found.not_compared}"
    return f"; {tensor_evidence(found)}"


def _rounding(found: Rounding | None) -> str:
    return "" if found is None else f"; {rounding_price(found)}"


def rounding_price(found: Rounding) -> str:
    """What rounding changed, for a sentence."""
    return (
        f"rounding to the stored dtype moved log-probabilities by up to {found.difference:.3g} nats (mean "
        f"{found.mean:.2g}) from the unrounded model's, {found.same_answers} of {found.answers} answers stayed the same"
    )


def tensor_evidence(found: TensorComparison) -> str:
    """What was compared and how well it agrees, for a sentence."""
    agreement = "bit-equal" if found.steps == 0 else f"equal within {found.steps:.2g} steps of rounding"
    return f"{found.compared} tensors, {found.adapted} of them adapted, {agreement} to base plus adapter"
