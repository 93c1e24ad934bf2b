"""Trackers, as the driver sees them: refused before anything runs, started beside the run, never waited for.

All work is done by ``python -m trainer.tracking RUN``, a process of its own that reads the run folder. Whatever becomes
of it, the run's exit code, files and pace are those of a run without it.
"""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

from trainer import console
from trainer.compose import config_text
from trainer.config.tracking import TrackingConfig
from trainer.errors import EXIT_DONE, EXIT_FAILURE, EXIT_STOPPED, ConfigError, Problem, RunError, TrimtabError
from trainer.paths import RunFolder, without_links, write_atomic
from trainer.plan import RunPlan, dump_plan, load_plan
from trainer.surroundings import agents_run, has_wandb_login, in_use, wandb_mode
from trainer.tracker_state import OFFLINE, read_state
from trainer_launch import agents

INSTALL = {
    "wandb": "pip install 'trimtab[wandb]'",
    "tensorboard": "pip install 'trimtab[tensorboard]'",
    "trackio": "pip install trackio (docs/tracking.md says with which packages)",
}
STOPPED_SECONDS = 10.0
"""Most time for the rest when a run is stopped: whoever stops it is waiting."""
MARGIN_SECONDS = 5.0


def require_trackers(tracking: TrackingConfig) -> None:
    """Look whether the chosen trackers are installed, and W&B's login is there where it will be needed.

    Raises:
        ConfigError: with everything that is missing.
    """
    problems = [
        Problem(
            what="is not installed",
            where=f"tracking.{name}",
            got=f"no package '{name}'",
            allowed="the trackers that are installed, or none",
            do=f"{INSTALL[name]}, or tracking=none",
        )
        for name in tracking.to
        if find_spec(name) is None
    ]
    if "wandb" in tracking.to and wandb_mode(tracking.wandb_mode) == "online" and not has_wandb_login():
        problems.append(
            _no_login("`wandb login`, or WANDB_MODE=offline / tracking.wandb_mode=offline, and send it later")
        )
    if problems:
        raise ConfigError.of(problems)


def _no_login(do: str) -> Problem:
    return Problem(
        what="needs a login",
        where="tracking.wandb",
        got="no WANDB_API_KEY, and no entry for the server in ~/.netrc",
        allowed="an API key of the server, which `wandb login` stores",
        do=do,
    )


class Beside:
    """The process beside a run."""

    def __init__(self, folder: RunFolder, plan: RunPlan) -> None:
        self._folder, self._tracking = folder, plan.config.tracking
        self._process: subprocess.Popen[bytes] | None = None
        self._over = threading.Event()
        self.code = EXIT_FAILURE

    def start(self) -> None:
        """Start it; that it cannot be started is a warning.

        A trial of a sweep that has no agent any more hears through it that the sweep ends it: by SIGTERM, which is how
        its agent would have told it.
        """
        self._folder.logs.mkdir(exist_ok=True)
        words = [sys.executable, "-m", "trainer.tracking", str(self._folder.root)]
        heard, told = os.pipe() if agents.has_no_agent() else (None, None)
        words += [] if told is None else ["--stop-to", str(told)]
        try:
            with open(self._folder.tracking_log, "ab", opener=without_links) as log:
                self._process = subprocess.Popen(
                    words,
                    stdin=subprocess.PIPE,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    pass_fds=() if told is None else (told,),
                )
        except OSError as fault:
            console.warn(f"tracking could not be started: {fault}")
        finally:
            if told is not None:
                os.close(told)
        if heard is not None:
            threading.Thread(target=self._listen, args=(heard,), name="sweep", daemon=True).start()

    def _listen(self, heard: int) -> None:
        """Stop this process when the sweep asks for it; the pipe ends with those who could."""
        with open(heard, "rb") as pipe:
            if pipe.readline() and not self._over.is_set():
                console.note("the sweep ends this trial")
                os.kill(os.getpid(), signal.SIGTERM)

    def ends_with(self, code: int) -> None:
        """Keep the run's exit code, for the trackers."""
        self.code = code

    def finish(self) -> None:
        """Tell the process the code and give it its time, then end it and whatever it started."""
        self._over.set()
        if self._process is None:
            return
        process, seconds = self._process, self._tracking.finish_seconds + MARGIN_SECONDS
        if self.code == EXIT_STOPPED:
            seconds = min(seconds, STOPPED_SECONDS)
        assert process.stdin is not None
        try:
            with suppress(OSError):  # it is gone
                process.stdin.write(f"{self.code}\n".encode())
                process.stdin.close()
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            pass
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        self._report()

    def _report(self) -> None:
        """One line per tracker: where it is, or what is missing and how to send it."""
        for name in in_use(self._tracking):
            state = read_state(self._folder, name)
            if state.complete:
                console.note(f"{name}: {state.url}")
            elif state.why == OFFLINE:
                console.note(f"{name}: offline; later: python -m trainer sync {self._folder.root}")
            else:
                why = f"{state.why or 'it was not reached'}; see {self._folder.tracking_log}"
                do = f"python -m trainer sync {self._folder.root}"
                console.warn(f"{name} has not got everything ({why}). To send the rest: {do}")


@contextmanager
def tracked(plan: RunPlan, folder: RunFolder, todo: Sequence[str] | None) -> Iterator[Beside]:
    """Track what happens in the block, if ``todo`` is not None. Its errors are the run's exit code for the trackers."""
    beside = Beside(folder, plan)
    if todo is not None and wanted(plan, folder, todo):
        if not todo:
            _write_tracking(plan, folder)
        beside.start()
    try:
        yield beside
    except TrimtabError as fault:
        beside.ends_with(fault.exit_code)
        raise
    except KeyboardInterrupt:
        beside.ends_with(EXIT_STOPPED)
        raise
    finally:
        beside.finish()


def _write_tracking(plan: RunPlan, folder: RunFolder) -> None:
    """Choose trackers for a run in which nothing else is left to do."""
    stored = load_plan(folder.plan_json.read_bytes())
    stored = replace(stored, config=replace(stored.config, tracking=plan.config.tracking))
    write_atomic(folder.config_yaml, config_text(stored.config))
    write_atomic(folder.plan_json, dump_plan(stored))


def wanted(plan: RunPlan, folder: RunFolder, todo: Sequence[str]) -> bool:
    """Whether there is something to track: a stage after ``prepare``, what was left unsent, or an agent's new run."""
    tracking = plan.config.tracking
    trackers = in_use(tracking)
    if len(trackers) < len(tracking.to):
        console.note("WANDB_MODE=disabled: nothing is sent to wandb")
    if not trackers:
        return False
    if any(stage != "prepare" for stage in todo):
        return True
    states = {name: read_state(folder, name) for name in trackers}
    agents = agents_run() if "wandb" in states else ""
    unsent = any(not state.complete and state.why != OFFLINE for state in states.values())
    return folder.metrics_jsonl.is_file() and (unsent or (agents != "" and states["wandb"].run != agents))


def sync_runs(runs: Sequence[Path]) -> int:
    """Send what the trackers of ``runs`` have not, one run after the other; 0: all of it arrived, 75: not all.

    Raises:
        RunError: a run has no tracker.
        ConfigError: a tracker is not installed, or W&B has no login.
    """
    folders = [RunFolder(path.resolve()) for path in runs]
    for folder in folders:
        tracking = load_plan(folder.plan_json.read_bytes()).config.tracking
        if not tracking.to:
            raise RunError(
                "this run has no tracker",
                where=str(folder.root),
                got="tracking=none",
                allowed="a run that was started with a tracker",
                do=f"python -m trainer run {folder.root} tracking.wandb=true: a finished run is sent as it is",
            )
        require_trackers(tracking)
        if tracking.wandb and not has_wandb_login():
            raise ConfigError.of([_no_login("`wandb login`")])
    codes = [_sync(folder) for folder in folders]
    return EXIT_DONE if all(code == EXIT_DONE for code in codes) else EXIT_STOPPED


def _sync(folder: RunFolder) -> int:
    console.say(f"{folder.root}")
    words = [sys.executable, "-m", "trainer.tracking", str(folder.root), "--sync"]
    with subprocess.Popen(words, stdin=subprocess.DEVNULL) as process:
        try:
            return process.wait()
        except KeyboardInterrupt:
            process.send_signal(signal.SIGINT)
            process.wait()
            raise
