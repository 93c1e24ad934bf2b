"""``packing.capacity=auto``: the largest pack that fits into the memory, decided before anything is prepared.

Powers of two only: they divide the usual batches, and two cards that differ by a little choose the same, so that the
same command stays the same run. How large a batch is may not depend on the memory of a GPU, so it has to be given in
tokens, and packs only divide it. What documents are longer than the packs is known after ``prepare``, which then does
what ``data.over_long`` says.
"""

from dataclasses import replace

from trainer.config import Config
from trainer.errors import ConfigError
from trainer.fitting import Case, candidates, choose, consider
from trainer.memory import ModelShape

LARGEST = 2**15
"""Above it nothing is won: on an H100 16k tokens at once were 12 % faster than 8k, 32k only 2 % faster than 16k."""
SMALLEST = 2**8
USUAL = 2**11
"""A layout is chosen for packs of this size, the default; then the largest packs that fit into that layout."""


def with_capacity(config: Config, case: Case | None, shape: ModelShape | None) -> tuple[Config, str]:
    """Return ``config`` with a number for ``packing.capacity=auto``, and why it is that number.

    Raises:
        ConfigError: no batch in tokens, a model whose sizes nobody knows yet, unknown memory, or nothing that fits.
    """
    if config.optim.batch_tokens is None or config.optim.batch_packs is not None:
        raise ConfigError(
            "packs of unknown size make batches of unknown size: what is learnt would depend on the memory of a GPU",
            where="optim.batch_tokens",
            got=f"batch_packs={config.optim.batch_packs} with packing.capacity=auto",
            allowed="the batch in tokens",
            do="optim.batch_tokens=131072 optim.batch_packs=null, or a number for packing.capacity",
        )
    if shape is None or case is None or case.room is None:
        raise ConfigError(
            "cannot be decided: "
            + ("the model's sizes are" if shape is None else "the memory of the GPUs is")
            + " not known before the run",
            where="packing.capacity",
            got="auto",
            allowed="a number, or auto for a Llama-like model that is on this machine and memory that it shows",
            do=f"packing.capacity={USUAL}, or: hf download {config.model.path} config.json"
            if shape is None
            else f"packing.capacity={USUAL}, or launch.gpu_memory_gb",
        )
    return _largest(config, case, shape, config.optim.batch_tokens)


def _largest(config: Config, case: Case, shape: ModelShape, batch: int) -> tuple[Config, str]:
    longest = min(LARGEST, shape.max_positions or LARGEST)
    sizes = [2**power for power in range(SMALLEST.bit_length() - 1, LARGEST.bit_length())]
    dividing = [size for size in sizes if size <= longest and batch % (size * case.world_size) == 0]
    if not dividing:
        raise ConfigError(
            f"no power of two from {SMALLEST} to {longest} divides the batch among {case.world_size} ranks",
            where="optim.batch_tokens",
            got=batch,
            allowed=f"a multiple of {SMALLEST * case.world_size}",
            do=f"optim.batch_tokens={max(1, round(batch / (USUAL * case.world_size))) * USUAL * case.world_size}",
        )
    numbered = {size: _case(case, size, batch) for size in dividing}
    first = max((size for size in dividing if size <= USUAL), default=dividing[0])
    options = candidates(
        config,
        world_size=case.world_size,
        accumulation=numbered[first].accumulation,
        device=case.device,
        deepspeed=case.deepspeed,
    )
    taken, _ = choose(numbered[first], options)
    if taken is None:  # the plan refuses it, with the figures and what would fit
        return numbered[first].config, "the smallest: nothing fits"
    reserve = config.parallel.memory_reserve
    fitting = [first]
    for size in (size for size in dividing if size > first):
        entry = consider(numbered[size], taken, reserve=reserve)
        if entry is None or entry.why_not:
            why = f"{size:,} does not fit with {taken.label}"
            break
        fitting.append(size)
    else:
        why = f"the largest up to {longest:,} that divides optim.batch_tokens={batch:,} among {case.world_size} rank(s)"
    return numbered[fitting[-1]].config, why


def _case(case: Case, size: int, batch: int) -> Case:
    config = replace(case.config, packing=replace(case.config.packing, capacity=size))
    return replace(case, config=config, accumulation=max(1, batch // size // case.world_size))
