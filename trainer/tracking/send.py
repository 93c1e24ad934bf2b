"""One tracker's process: ``python -m trainer.tracking.send RUN TRACKER [--online] [--stop-to FD]``.

It reads what the run folder has and the tracker has not, until its standard input ends; there the exit code of the run
stands. A tracker that hangs or breaks takes nothing with it but this process. When W&B asks for the end of the run, the
driver hears of it through the pipe FD; without one, nobody does.
"""

import argparse
import os
import secrets
import select
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from trainer.errors import EXIT_DONE, EXIT_STOPPED
from trainer.paths import RunFolder
from trainer.plan import RunPlan, load_plan
from trainer.records import GrowingRecords
from trainer.redaction import redact
from trainer.surroundings import agents_run, wandb_mode
from trainer.tracker_state import OFFLINE, TrackerState, read_end, read_state, write_state
from trainer.tracking.figures import config_of, lineage_of, row_of, summary_of
from trainer.tracking.sink import Facts, Sink
from trainer.tracking.system import SystemRows
from trainer.tracking.texts import tables_of, weights_of

POLL_SECONDS = 1.0


def feed(folder: RunFolder, sink: Sink, ended: Callable[[], bool], say: Callable[[str], None]) -> int:
    """Send the steps that the tracker has not, until ``ended``; gives the last step that was sent or was there.

    ``ended`` waits a little. After it was true, what is in the folder is all there will be.
    """
    records, system = GrowingRecords(folder.metrics_jsonl), SystemRows(folder.system_jsonl)
    last, first = sink.open(), 0
    say(f"{sink.url}: has steps until {last}" if last else f"{sink.url}: a new run")
    over = False
    while not over:
        over = ended()
        for record in records.new():
            step = int(str(record["step"]))
            if step <= last:
                continue
            first, last = first or step, step
            sink.log(step, row_of(record) | system.up_to(step))
    say(f"steps {first} to {last} were sent" if first else "there are no new steps")
    return last


def facts_of(folder: RunFolder, plan: RunPlan, state: TrackerState, code: int) -> Facts:
    """What is told at the end."""
    upload = plan.config.tracking.upload
    return Facts(
        code=code,
        summary=summary_of(folder) | SystemRows(folder.system_jsonl).totals(),
        lineage=lineage_of(folder),
        tables=tables_of(folder) if "text" in upload else (),
        weights=weights_of(folder) if "weights" in upload else None,
        sent=state.sent,
    )


def send(
    folder: RunFolder,
    plan: RunPlan,
    tracker: str,
    *,
    online: bool,
    say: Callable[[str], None],
    on_stop: Callable[[], None],
) -> int:
    """Feed ``tracker`` until standard input ends; 0: everything has arrived, 75: not everything.

    ``on_stop`` is called, from any thread, when the tracker asks for the end of the run.
    """
    state = begun(folder, tracker)
    mode = "online" if online else wandb_mode(plan.config.tracking.wandb_mode)
    sink = sink_for(tracker, folder, plan, state, mode, on_stop)
    say(f"run {state.run}")
    sent = feed(folder, sink, input_ended, say)
    facts = facts_of(folder, plan, state, read_end(folder).code)
    sink.finish(facts)
    if tracker == "wandb" and mode == "offline":
        write_state(folder, tracker, replace(state, why=OFFLINE))
        return EXIT_DONE
    arrived = sink.arrived()
    state = replace(state, url=sink.url, step=max(state.step, arrived))
    if arrived < sent:
        write_state(folder, tracker, replace(state, why=f"it has steps until {arrived} of {sent}"))
        return EXIT_STOPPED
    write_state(folder, tracker, replace(state, sent=facts.digests(), complete=True, why=""))
    return EXIT_DONE


def begun(folder: RunFolder, tracker: str) -> TrackerState:
    """The state with a run's name in it: the agent's, the one of the time before, or a new one.

    An agent wants the figures in its own run. If the folder was tracked as another run before, the agent's run gets all
    of them from the first step on, and the other one stays as it is.
    """
    state = read_state(folder, tracker)
    wanted = agents_run() if tracker == "wandb" else ""
    if wanted and wanted != state.run:
        state = TrackerState(run=wanted)
    state = replace(state, run=state.run or secrets.token_hex(4), complete=False, why="it was not told the end")
    write_state(folder, tracker, state)
    return state


def sink_for(
    tracker: str, folder: RunFolder, plan: RunPlan, state: TrackerState, mode: str, on_stop: Callable[[], None]
) -> Sink:
    """The tracker, with what the config says about it. Its client is imported here."""
    tracking, config = plan.config.tracking, config_of(plan)
    name = tracking.name or f"{plan.name}-{plan.identity}"
    if tracker == "wandb":
        from trainer.tracking.to_wandb import WandbSink

        return WandbSink(
            run_id=state.run,
            name=name,
            project=tracking.project,
            entity=tracking.entity,
            group=tracking.group,
            tags=tracking.tags,
            notes=tracking.notes,
            config=config,
            folder=folder.tracking,
            mode="offline" if mode == "offline" else "online",
            on_stop=on_stop,
        )
    if tracker == "tensorboard":
        from trainer.tracking.to_tensorboard import TensorboardSink

        place = tracking.tensorboard_dir
        return TensorboardSink(folder=Path(place) if place else folder.tracking / "tensorboard", config=config)
    from trainer.tracking.to_trackio import TrackioSink

    return TrackioSink(name=name, project=tracking.project, group=tracking.group, config=config)


def input_ended() -> bool:
    """Wait a second for the end of standard input."""
    ready, _, _ = select.select([0], [], [], POLL_SECONDS)
    return bool(ready) and not os.read(0, 64)


def tell_of_stop(stop_to: int | None, say: Callable[[str], None]) -> None:
    """Tell the driver through the pipe ``stop_to`` that the tracker asks for the end of the run."""
    if stop_to is None:
        say("its server asks for the end of this run; a run is stopped where it runs, and this one goes on")
        return
    say("its server asks for the end of this trial")
    with suppress(OSError):  # the driver is gone
        os.write(stop_to, b"stop\n")


def main() -> int:
    """The program of this module."""
    parser = argparse.ArgumentParser(
        prog="python -m trainer.tracking.send", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("tracker", choices=["wandb", "tensorboard", "trackio"])
    parser.add_argument("--online", action="store_true")
    parser.add_argument("--stop-to", type=int, metavar="FD")
    found = parser.parse_args()
    folder, tracker = RunFolder(found.run), found.tracker

    def say(text: str) -> None:
        print(redact(f"{tracker}: {text}"), flush=True)  # noqa: T201

    def on_stop() -> None:
        tell_of_stop(found.stop_to, say)

    try:
        plan = load_plan(folder.plan_json.read_bytes())
        code = send(folder, plan, tracker, online=found.online, say=say, on_stop=on_stop)
    except Exception as fault:  # whatever a client raises: here it ends
        why = redact(f"{type(fault).__name__}: {' '.join(str(fault).split())}")
        write_state(folder, tracker, replace(read_state(folder, tracker), why=why))
        say(why)
        return EXIT_STOPPED
    state = read_state(folder, tracker)
    say(f"everything has arrived: {state.url}" if state.complete else state.why)
    return code


if __name__ == "__main__":
    result = main()
    sys.stdout.flush()
    os._exit(result)  # a client's own exit would wait for its server
