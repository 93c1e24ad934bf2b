"""Trackio, in its database on this machine: no Space, no server and nothing of its own that looks at the machine."""

from collections.abc import Mapping
from typing import Any

import trackio  # pyright: ignore[reportMissingImports]
from trackio.sqlite_storage import SQLiteStorage  # pyright: ignore[reportMissingImports]

from trainer.tracking.sink import Facts
from trainer.tracking.texts import COLUMNS


class TrackioSink:
    """A run ``name`` of ``project``."""

    def __init__(self, *, name: str, project: str, group: str | None, config: Mapping[str, Any]) -> None:
        self._name, self._project, self._group, self._config = name, project, group, dict(config)
        self._run: Any = None
        self._last = 0

    @property
    def url(self) -> str:
        """How to look at it."""
        return f"trackio show --project {self._project}"

    def open(self) -> int:
        """Begin or resume the run."""
        self._run = trackio.init(
            project=self._project,
            name=self._name,
            group=self._group,
            config=self._config,
            resume="allow",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )
        self._last = self.arrived()
        return self._last

    def log(self, step: int, row: Mapping[str, float]) -> None:
        """Add the figures of a step."""
        self._run.log(dict(row), step=step)
        self._last = step

    def finish(self, facts: Facts) -> None:
        """Tell the facts beside the last step, as Trackio has no place for them, and write everything."""
        told: dict[str, Any] = dict(facts.summary)
        for table in facts.fresh_tables():
            rows = [dict(zip(COLUMNS, row, strict=True)) for row in table.rows]
            told[f"predictions/{table.name}"] = trackio.Table(data=rows)
        if told and self._last:
            self._run.log(told, step=self._last)
        self._run.finish()

    def arrived(self) -> int:
        """Ask the database."""
        return SQLiteStorage.get_max_step_for_run(self._project, self._name) or 0
