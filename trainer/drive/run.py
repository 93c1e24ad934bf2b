"""One verb on one run: make the plan, take the folder, do the stages, say what came of it."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

from trainer import console
from trainer.compose import compose, config_text
from trainer.config import Config
from trainer.drive.deadline import stopping_in_time
from trainer.drive.environment import usable_cores
from trainer.drive.folder import make_folder, require_same_identity, write_inputs
from trainer.drive.lock import hold
from trainer.drive.machines import Typed, chaired, find_place, follow, start_all
from trainer.drive.overview import show_end, show_imagined, show_plan, show_start
from trainer.drive.prepared import read_prepared, read_schedule, settled
from trainer.drive.stages import DriverJob, Programs, launch_spec, mark_done, pending, run_stages
from trainer.drive.submit import devices_of_job, submit_run
from trainer.drive.tracked import require_trackers, tracked
from trainer.drive.trial import note_folder, placed
from trainer.errors import EXIT_DONE, ConfigError, Problem, RunError
from trainer.imagined import imagined
from trainer.markers import BY_RANKS, STAGES, read_marker
from trainer.paths import RunFolder
from trainer.plan import Devices, RunPlan, load_plan, make_plan
from trainer_launch.devices import visible_gpus
from trainer_launch.room import gpu_memory, has_c_compiler, main_memory


@dataclass(frozen=True, slots=True, kw_only=True)
class Verb:
    """What a verb does: ``stages`` that it brings up to date, after ``needs`` was finished by an earlier command."""

    help: str
    stages: tuple[str, ...]
    needs: str = ""


VERBS = {
    "run": Verb(
        help="everything: prepare, baseline, train, evaluate, export, verify, card (no verb: run)", stages=STAGES
    ),
    "plan": Verb(help="prepare the data, print what a run would do, and stop", stages=("prepare",)),
    "prepare": Verb(help="read, check, split and tokenise the data", stages=("prepare",)),
    "train": Verb(help="train, from the newest checkpoint if there is one", stages=("prepare", "train")),
    "evaluate": Verb(
        help="score base and tuned model on the test split", stages=("prepare", "baseline", "evaluate"), needs="train"
    ),
    "export": Verb(help="write adapter and merged model", stages=("prepare", "export"), needs="train"),
    "verify": Verb(help="reload the export in a fresh process and compare", stages=("verify",), needs="export"),
}


PROGRAMS = Programs()


def do_new(
    verb: str,
    config: Config,
    *,
    cwd: Path,
    command: str,
    words: Sequence[str] = (),
    node_rank: int | None = None,
    programs: Programs = PROGRAMS,
) -> int:
    """Do ``verb`` for the run that ``config`` means, new or not; gives the exit code.

    ``command``: what was typed; ``words``: what means this one run, after ``python -m trainer``. ``node_rank``: which
    of several machines this is, None when nobody said.

    Raises:
        TrimtabError: everything that stops a run before or after its processes.
    """
    config = placed(config)
    elsewhere = imagined(config, devices_here(config)) if verb == "plan" else None
    if elsewhere is not None:
        show_imagined(make_plan(config, devices=elsewhere, cwd=cwd))
        return EXIT_DONE
    return _do_here(verb, config, Typed(command, tuple(words), node_rank, cwd), programs)


def do_existing(
    verb: str,
    run: Path,
    overrides: Sequence[str],
    *,
    cwd: Path,
    command: str,
    show_config: bool = False,
    node_rank: int | None = None,
    programs: Programs = PROGRAMS,
) -> int:
    """Do ``verb`` for the run in the folder ``run``, with its own config and ``overrides`` (key=value) on top.

    The run is planned anew for this machine; only ``verify`` takes the plan as it is, because it needs neither the
    data nor the base model's place.

    Raises:
        TrimtabError: everything that stops a run before or after its processes.
    """
    root = run.resolve()
    stored = load_plan(RunFolder(root).plan_json.read_bytes())
    config = _with_overrides(stored.config, overrides, cwd)
    config.run.dir = str(root)
    if show_config:
        console.say(config_text(config).rstrip())
        return EXIT_DONE
    if verb == "verify" and not overrides:
        return _do(verb, dataclasses.replace(stored, run_dir=str(root)), command, programs)
    words = (verb, str(root), *overrides)
    return _do_here(verb, config, Typed(command, words, node_rank, cwd), programs)


def _do_here(verb: str, config: Config, typed: Typed, programs: Programs) -> int:
    """Do what falls to this machine: everything, node 0's part, another node's, or saying what to type on each."""
    together = any(stage in BY_RANKS for stage in VERBS[verb].stages)
    place = find_place(config, typed, together=together)
    if not place.node:
        require_trackers(config.tracking)
    if place.submits:
        plan = make_plan(place.config, devices=devices_of_job(place.config), cwd=typed.cwd)
        return submit_run(plan, verb, cwd=typed.cwd, check=lambda folder: _left_to_do(verb, plan, folder))
    if place.only_starts:
        plan = make_plan(place.config, devices=_assumed_devices(place.config), cwd=typed.cwd)
        return start_all(plan, typed)
    if place.node:
        return follow(
            lambda: make_plan(place.config, devices=devices_here(place.config), cwd=typed.cwd),
            place,
            lambda plan: launch_spec(plan, programs, (), node=place.node),
            verb,
            VERBS[verb].stages,
        )
    return _do(
        verb, make_plan(place.config, devices=devices_here(place.config), cwd=typed.cwd), typed.command, programs
    )


def _do(verb: str, plan: RunPlan, command: str, programs: Programs) -> int:
    folder = RunFolder(Path(plan.run_dir))
    make_folder(folder)
    note_folder(folder)
    with hold(folder.lock, verb) as lock:
        todo = _left_to_do(verb, plan, folder)
        if todo:
            folder.done.unlink(missing_ok=True)
            write_inputs(folder, plan)
            show_start(plan, folder, todo)
        minutes, grace = plan.config.run.time_limit, plan.config.launch.grace
        limit = None if minutes is None else minutes * 60
        tracks = any(stage != "prepare" for stage in VERBS[verb].stages)
        with (
            stopping_in_time(limit, grace=grace),
            tracked(plan, folder, todo if tracks else None) as beside,
            chaired(plan, folder, todo) as chair,
        ):
            job = DriverJob(plan=plan, folder=folder, lock=lock, command=command, programs=programs, chair=chair)
            code = run_stages(job, VERBS[verb].stages)
            beside.ends_with(code)
            if code != EXIT_DONE:
                return code
            if chair is not None:
                chair.ends_with(EXIT_DONE)
        _finish(verb, plan, folder, was_done=not todo)
    return EXIT_DONE


def _left_to_do(verb: str, plan: RunPlan, folder: RunFolder) -> list[str]:
    """The stages of ``verb`` that are pending; refuses a folder of another run, or a stage that is not its turn."""
    require_same_identity(folder, plan)
    _require_finished(folder, plan, VERBS[verb].needs)
    return pending(plan, folder, VERBS[verb].stages)


def _finish(verb: str, plan: RunPlan, folder: RunFolder, *, was_done: bool) -> None:
    left = pending(plan, folder, STAGES)
    if verb == "plan":
        prepared = read_prepared(folder)
        show_plan(settled(plan, prepared), folder, prepared, read_schedule(folder), left)
        return
    if not left and not folder.done.exists():
        mark_done(folder, plan.identity)
    if verb == "run":
        show_end(folder)
    elif left:
        console.note(f"left to do for the whole run: {', '.join(left)} (python -m trainer run {folder.root})")
    if was_done:
        console.say(f"everything was done before, with the same inputs: {folder.root}")
        console.note(f"to do a stage again, remove its file in {folder.stages}")


def _require_finished(folder: RunFolder, plan: RunPlan, stage: str) -> None:
    if stage and pending(plan, folder, (stage,)):
        marker = read_marker(folder, stage)
        raise RunError(
            f"the stage '{stage}' comes first",
            where=str(folder.root),
            got="not finished" if marker is None else f"finished {marker.finished} with other inputs",
            allowed=f"a run whose stage '{stage}' is finished",
            do=f"python -m trainer {stage} {folder.root}",
        )


def _with_overrides(config: Config, overrides: Sequence[str], cwd: Path) -> Config:
    """Lay ``overrides`` over a stored config, by the same rules and with the same errors as for a new run."""
    groups = [word for word in overrides if "." not in word.partition("=")[0]]
    if groups:
        raise ConfigError.of(
            [
                Problem(
                    what="a run that exists has its config already; a whole group cannot be chosen again",
                    where="command line",
                    got=word,
                    allowed="section.key=value",
                    do="set single keys, or start a new run",
                )
                for word in groups
            ]
        )
    if not overrides:
        return config
    with TemporaryDirectory() as folder:
        stored = Path(folder) / "experiment" / "stored.yaml"
        stored.parent.mkdir()
        stored.write_text(f"# @package _global_\n{config_text(config)}", encoding="utf-8")
        return compose(["experiment=stored", *overrides], config_dir=Path(folder), cwd=cwd)


def _assumed_devices(config: Config) -> Devices:
    """What to plan with where nothing will run: the machines have the GPUs that are asked for, if this one has none."""
    here = devices_here(config)
    wanted = 0 if config.launch.device == "cpu" else max(here.gpus, config.launch.processes or 1)
    return dataclasses.replace(here, gpus=wanted)


def devices_here(config: Config) -> Devices:
    """What there is on this machine for a run of ``config``."""
    gpus = 0 if config.launch.device == "cpu" else visible_gpus()
    return Devices(
        gpus=gpus,
        cores=usable_cores(),
        deepspeed=find_spec("deepspeed") is not None,
        gpu_memory=gpu_memory() if gpus else None,
        main_memory=main_memory(),
        compiles=not gpus or (find_spec("triton") is not None and has_c_compiler()),
        bitsandbytes=find_spec("bitsandbytes") is not None,
    )
