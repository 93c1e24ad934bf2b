"""Weights & Biases. Its client is told to collect nothing by itself: no code, git, console, host, packages or job.

The server is asked how far it has got, before and after: a client that was refused in between says that all went well.
Offline, the client's folder always holds the whole run, from its first step, because ``wandb sync`` of a run in several
pieces would number its steps anew.
"""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import wandb

from trainer.errors import EXIT_STOPPED
from trainer.tracking.figures import as_in_sweep_files
from trainer.tracking.sink import Facts
from trainer.tracking.texts import COLUMNS, Table, Weights

INIT_SECONDS = 60.0
ASK_SECONDS = 20
SILENT: dict[str, Any] = {
    "console": "off",
    "disable_code": True,
    "disable_git": True,
    "disable_job_creation": True,
    "program": "trainer",
    "quiet": True,
    "save_code": False,
    "silent": True,
    "x_disable_machine_info": True,
    "x_disable_meta": True,
    "x_disable_stats": True,  # trainer/tracking/system.py has these figures
    "x_disable_viewer": True,  # a request for the name and e-mail of the account
    "x_save_requirements": False,
}


class WandbSink:
    """A run ``run_id`` of ``project``; ``folder`` is where the client keeps its files.

    ``on_stop``: called, in a thread, when the server asks for the end of the run: a person on its page, or its sweep.
    The client's own answer would interrupt this process, which is not the one that is meant.
    """

    def __init__(
        self,
        *,
        run_id: str,
        name: str,
        project: str,
        entity: str | None,
        group: str | None,
        tags: list[str],
        notes: str | None,
        config: Mapping[str, Any],
        folder: Path,
        mode: Literal["online", "offline"],
        on_stop: Callable[[], None],
    ) -> None:
        self._folder, self._id, self._name = folder, run_id, name
        self._mode: Literal["online", "offline"] = mode
        self._given = {"project": project, "entity": entity, "group": group, "tags": tags or None, "notes": notes}
        self._config = dict(config)
        self._on_stop = on_stop
        self._run: Any = None
        self._last = 0

    @property
    def url(self) -> str:
        """The page of the run; empty offline."""
        return "" if self._run is None or self._mode == "offline" else self._run.url or ""

    def open(self) -> int:
        """Begin or resume the run; offline: always from the beginning.

        Raises:
            wandb.Error: no connection, no such project, no permission.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        self._run = wandb.init(
            id=self._id,
            name=self._name,
            config=self._config,
            dir=str(self._folder),
            mode=self._mode,
            resume="allow" if self._mode == "online" else None,
            settings=wandb.Settings(init_timeout=INIT_SECONDS, stop_fn=self._on_stop, **SILENT),
            **self._given,
        )
        if self._mode == "online":
            self._last = max(0, self._run.starting_step - 1)
        return self._last

    def log(self, step: int, row: Mapping[str, float]) -> None:
        """Add the figures of a step; in a sweep also by the names of its file."""
        judged = as_in_sweep_files(row) if self._run.sweep_id else {}
        self._run.log({**row, **judged}, step=step, commit=True)
        self._last = step

    def finish(self, facts: Facts) -> None:
        """Tell the facts and wait until the client has sent what it has.

        Stopped runs count as preempted, but not those of a sweep: W&B would give these to the next agent that asks,
        while their own task goes on with them, or after the sweep itself has stopped them.
        """
        run = self._run
        judged = as_in_sweep_files(facts.summary) if run.sweep_id else {}
        run.summary.update({**facts.summary, **judged})
        if facts.lineage:
            run.config.update({"lineage": dict(facts.lineage)}, allow_val_change=True)
        for table in facts.fresh_tables():
            run.log_artifact(self._tables(table))
        weights = facts.fresh_weights()
        if weights is not None:
            run.log_artifact(self._weights(weights), aliases=["best"])
        if facts.code == EXIT_STOPPED and not run.sweep_id:
            run.mark_preempting()
        run.finish(exit_code=facts.code)
        if self._mode == "offline":
            self._keep_only(Path(run.dir).parent.name)

    def _tables(self, table: Table) -> Any:
        artifact = wandb.Artifact(f"{self._name}-{table.name}", type="evaluation")
        artifact.add(wandb.Table(columns=list(COLUMNS), data=[*table.rows]), "predictions")
        return artifact

    def _weights(self, weights: Weights) -> Any:
        artifact = wandb.Artifact(self._name, type="model", metadata={"export": weights.folder.name})
        artifact.add_dir(str(weights.folder))
        return artifact

    def arrived(self) -> int:
        """Ask the server; offline: what was written.

        Raises:
            wandb.Error: it does not answer.
        """
        if self._mode == "offline":
            return self._last
        there = wandb.Api(timeout=ASK_SECONDS).run(self._run.path)
        self._keep_only("")
        return max(0, int(there.lastHistoryStep))

    def _keep_only(self, name: str) -> None:
        """Remove what the client keeps of this run elsewhere: what has arrived must not be sent from there again."""
        for path in (self._folder / "wandb").glob(f"*run-*-{self._id}"):
            if path.name != name and path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
