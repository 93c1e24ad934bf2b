"""What the keys of a Slurm job say: they are keys of a Slurm job alone, and end up as words of a batch script."""

from collections.abc import Iterator

from trainer.config import Config
from trainer.errors import Problem
from trainer.rules.problems import no_effect
from trainer_launch.batch_script import OWN_OPTIONS, limit_seconds, option_name

ASKED = ("time", "partition", "account", "qos", "constraint", "gres", "mem")
"""Keys that are given to sbatch as they are."""
SLURM_ONLY = (*ASKED, "cpus", "options", "prolog", "srun", "container", "python", "max_stalls", "wait")
OF_HANDS = ("hosts", "ssh")


def slurm_rules(config: Config) -> Iterator[Problem]:
    """Yield keys of Slurm jobs without one, and what would not be one word, or another option than was meant."""
    launch = config.launch
    if launch.name != "slurm":
        yield from no_effect("launch", launch, SLURM_ONLY, f"launch={launch.name}", "launch=slurm, or remove it")
        return
    yield from no_effect("launch", launch, OF_HANDS, "launch=slurm", "remove it: Slurm chooses the machines")
    values = {"time": launch.time, "partition": launch.partition, "account": launch.account, "qos": launch.qos}
    values |= {"constraint": launch.constraint, "gres": launch.gres, "mem": launch.mem}
    for name, value in values.items():
        if value is not None and (not value.strip() or not value.isprintable()):
            yield Problem(what="is no value for sbatch", where=f"launch.{name}", got=repr(value), do="remove it")
    for name, options in (("options", launch.options), ("srun", launch.srun)):
        for option in options:
            yield from _option_problems(f"launch.{name}", option)
    seconds = limit_seconds(launch.time or "")
    if seconds is not None and launch.grace >= seconds > 0:
        yield Problem(
            what="is not before the end of the job",
            where="launch.grace",
            got=f"{launch.grace} s before the end, with launch.time={launch.time}",
            allowed=f"less than {seconds} s; Slurm may send the signal up to 60 s earlier",
            do="a longer launch.time, or a shorter launch.grace",
        )


def _option_problems(where: str, option: str) -> Iterator[Problem]:
    name = option_name(option)
    if not name or not option.isprintable():
        yield Problem(
            what="is no option",
            where=where,
            got=repr(option),
            allowed="--name or --name=value, on one line",
            do="write the long form",
        )
    elif name in OWN_OPTIONS:
        yield Problem(
            what="is set by the submission or has a key of its own",
            where=where,
            got=option,
            allowed="other options",
            do="see the keys of launch in `python -m trainer --help`",
        )
