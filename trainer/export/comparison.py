"""What the fresh process found out about one export folder; ``export/verification.json`` holds one per folder."""

from dataclasses import dataclass

VERIFICATION = "verification.json"
MEAN_SHARE = 0.1
"""The mean difference may be this share of the largest allowed one."""


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
class Comparison:
    """One folder against the trained model.

    ``difference``, ``mean``: largest and mean difference of a log-probability; ``near_ties``: answers that differ
    from a pair of tokens on whose log-probabilities are closer than the tolerance; ``base_difference`` and
    ``base_mean``: the same two for the base without the adapter (None where it was not measured). ``tensors``: for a
    model that an adapter was merged into (None for others).
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
        f"(mean {comparison.mean:.2g}, allowed {comparison.tolerance:g}{control})" + _tensors(comparison.tensors)
    )


def _tensors(found: TensorComparison | None) -> str:
    if found is None:
        return ""
    if found.not_compared:
        return f"; tensors not compared: {found.not_compared}"
    return f"; {tensor_evidence(found)}"


def tensor_evidence(found: TensorComparison) -> str:
    """What was compared and how well it agrees, for a sentence."""
    agreement = "bit-equal" if found.steps == 0 else f"equal within {found.steps:.2g} steps of rounding"
    return f"{found.compared} tensors, {found.adapted} of them adapted, {agreement} to base plus adapter"
