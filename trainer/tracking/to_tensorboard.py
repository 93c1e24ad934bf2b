"""TensorBoard event files, written without torch and TensorFlow.

The files themselves say how far they have got: they are read before anything is added.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tensorboard.compat.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]
from tensorboard.compat.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]
from tensorboard.compat.proto.tensor_pb2 import TensorProto  # pyright: ignore[reportAttributeAccessIssue]
from tensorboard.compat.proto.types_pb2 import DT_STRING  # pyright: ignore[reportAttributeAccessIssue]
from tensorboard.plugins.text import metadata
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from trainer.tracking.sink import Facts
from trainer.tracking.texts import COLUMNS, Table

CONFIG = "config"


class TensorboardSink:
    """The event files in ``folder``."""

    def __init__(self, *, folder: Path, config: Mapping[str, Any]) -> None:
        self._folder, self._config = folder, dict(config)
        self._writer: Any = None
        self._last = 0

    @property
    def url(self) -> str:
        """The folder, for ``tensorboard --logdir``."""
        return str(self._folder)

    def open(self) -> int:
        """Begin another file beside those that are there."""
        self._last = last_step(self._folder)
        self._writer = EventFileWriter(str(self._folder))
        if self._last == 0:
            self._add(0, [_text(CONFIG, _as_code(self._config))])
        return self._last

    def log(self, step: int, row: Mapping[str, float]) -> None:
        """Add the figures of a step, and have them on disk."""
        self._add(step, [Summary.Value(tag=name, simple_value=value) for name, value in row.items()])
        self._writer.flush()
        self._last = step

    def finish(self, facts: Facts) -> None:
        """Add the facts at the last step, if they are others than before."""
        values = [Summary.Value(tag=name, simple_value=value) for name, value in facts.summary.items()]
        if facts.lineage:
            values.append(_text("lineage", _as_code(facts.lineage)))
        values += [_text(f"predictions/{table.name}", _as_table(table)) for table in facts.fresh_tables()]
        self._add(self._last, values)
        self._writer.close()

    def arrived(self) -> int:
        """The last step in the files."""
        return last_step(self._folder)

    def _add(self, step: int, values: list[Any]) -> None:
        self._writer.add_event(Event(step=step, summary=Summary(value=values)))


def last_step(folder: Path) -> int:
    """The last step with a training loss in the event files of ``folder``; 0: there is none."""
    return max((step for step, names in events_of(folder) if "train/loss" in names), default=0)


def events_of(folder: Path) -> Iterator[tuple[int, list[str]]]:
    """Step and names of every event; a file that ends in the middle of one is read as far as it goes."""
    for path in sorted(folder.glob("events.out.tfevents.*")):
        for event in EventFileLoader(str(path)).Load():
            yield event.step, [value.tag for value in event.summary.value]


def _as_code(values: Mapping[str, Any]) -> str:
    return f"```json\n{msgspec.json.format(msgspec.json.encode(values), indent=1).decode()}\n```"


def _as_table(table: Table) -> str:
    """Markdown, with what would end a cell or begin HTML made harmless."""
    lines = [COLUMNS, ["---"] * len(COLUMNS), *table.rows]
    cells = [
        [cell.replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|").replace("\n", " ") for cell in line]
        for line in lines
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def _text(name: str, text: str) -> Any:
    tensor = TensorProto(dtype=DT_STRING, string_val=[text.encode()])
    return Summary.Value(
        tag=name, tensor=tensor, metadata=metadata.create_summary_metadata(display_name=name, description="")
    )
