"""The run folder before anything runs in it: whose it is, and what is written into it first."""

import msgspec

from trainer import console
from trainer.compose import config_text
from trainer.drive.environment import describe_environment
from trainer.errors import RunError
from trainer.paths import RunFolder, write_atomic
from trainer.plan import RunPlan, dump_plan, identity_diff, load_plan, zero_spec
from trainer.redaction import redact
from trainer_launch.zero import deepspeed_json


def make_folder(folder: RunFolder) -> None:
    """Make the run folder.

    Raises:
        RunError: it cannot be made or written to.
    """
    try:
        folder.root.mkdir(parents=True, exist_ok=True)
        probe = folder.root / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as fault:
        raise RunError(
            "cannot write into the run folder",
            where=str(folder.root),
            got=fault.strerror or str(fault),
            allowed="a folder that you may write to",
            do="set run.root (or run.dir) to another place",
        ) from None


def require_same_identity(folder: RunFolder, plan: RunPlan) -> None:
    """Refuse a given folder that holds a run with another identity; say so when other code had worked on it.

    A folder whose name is the identity needs no look.

    Raises:
        RunError: with everything in which the two differ.
    """
    if plan.config.run.dir is None or not folder.plan_json.exists():
        return
    before = load_plan(folder.plan_json.read_bytes())
    if before.identity != plan.identity:
        raise RunError(
            "the run folder holds a run that trains differently",
            where=str(folder.root),
            got="\n       ".join([f"{before.identity} -> {plan.identity}", *identity_diff(before, plan)]),
            allowed="a new folder, or one of a run with the same model, data and settings",
            do="give another run.dir, leave run.dir out (every run then gets its own folder), or undo the differences",
        )
    if before.code_version != plan.code_version:
        console.warn(f"this run was worked on by version {before.code_version}; it goes on with {plan.code_version}")


def write_inputs(folder: RunFolder, plan: RunPlan) -> None:
    """Write config.yaml, env.json and plan.json: what the run's processes read, and what it is done with.

    Under ZeRO also ``launch/deepspeed.json``, to look at: ranks make the same of plan.json.
    """
    write_atomic(folder.config_yaml, config_text(plan.config))
    described = msgspec.json.format(msgspec.json.encode(describe_environment(plan.device)), indent=2)
    write_atomic(folder.env_json, redact(described.decode()) + "\n")
    zero = zero_spec(plan)
    if zero is None:
        folder.deepspeed_json.unlink(missing_ok=True)
    else:
        write_atomic(folder.deepspeed_json, deepspeed_json(zero))
    write_atomic(folder.plan_json, dump_plan(plan))
