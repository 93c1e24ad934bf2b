"""Rules of the rows: where they come from, how they are divided, which built-in tasks there are."""

from collections.abc import Iterator

from trainer.config import LEGAL_TASKS, Config, DataConfig
from trainer.errors import Problem
from trainer.rules.names import HUB_DATA
from trainer.rules.problems import no_effect, not_among

_FILES_ONLY = (
    "train",
    "validation",
    "test",
    "mixture",
    "revision",
    "format",
    "columns",
    "label_column",
    "group_column",
)
_MADE_SPLITS = ("validation_share", "test_share")


def source_rules(config: Config) -> Iterator[Problem]:
    """Yield what is wrong with where the rows come from, and settings that do not go with that."""
    data = config.data
    if data.kind == "files":
        if not data.train and not data.mixture:
            yield Problem(
                what="no training data",
                where="data.train",
                got="neither data.train nor data.mixture",
                allowed="files (.jsonl .json .csv .parquet), folders, hub:ORG/NAME",
                do="add data.train=my.jsonl, or choose an experiment: +experiment=legal_lora",
            )
        if data.train and data.mixture:
            yield Problem(
                what="two answers to where the training rows are",
                where="data.train",
                got="data.train and data.mixture",
                allowed="one of them",
                do="move the paths of data.train into data.mixture, each with a weight",
            )
        yield from no_effect("data", data, ("tasks", "max_characters"), "data.kind=files", "remove it, or data=legal")
    else:
        yield from no_effect("data", data, (*_FILES_ONLY, *_MADE_SPLITS), f"data.kind={data.kind}", "use data=files")
    if data.kind == "smoke":
        yield from no_effect("data", data, ("tasks", "max_characters"), "data.kind=smoke", "remove it")
    if data.revision is not None and data.kind == "files" and not any(map(_is_hub_data, _paths(data))):
        yield Problem(
            what="has no effect: no data comes from the Hub",
            where="data.revision",
            got=data.revision,
            allowed="null",
            do="remove it, or name a data set as hub:ORG/NAME",
        )
    if data.system is not None and config.task.name == "text":
        yield from no_effect("data", data, ("system",), "task.name=text", "remove it")
    if data.over_long != "split":
        because = f"data.over_long={data.over_long}"
        yield from no_effect("data", data, ("split_overlap",), because, "add data.over_long=split, or remove it")
    elif data.split_overlap >= config.packing.tokens:
        yield Problem(
            what="chunks would never advance",
            where="data.split_overlap",
            got=f"{data.split_overlap} tokens with packing.capacity={config.packing.tokens}",
            allowed=f"0 to {config.packing.tokens - 1}",
            do="a tenth of the capacity is plenty",
        )


def _paths(data: DataConfig) -> list[str]:
    """Return every path that the section names, in the order of its fields."""
    return [*data.train, *data.validation, *data.test, *(part.path for part in data.mixture)]


def _is_hub_data(path: str) -> bool:
    return path.startswith(HUB_DATA)


def split_rules(config: Config) -> Iterator[Problem]:
    """Yield what is wrong with the division into training, validation and test."""
    data = config.data
    if data.kind != "files":
        return
    made = (0.0 if data.validation else data.validation_share) + (0.0 if data.test else data.test_share)
    if made >= 1.0:
        yield Problem(
            what="no rows would be left for training",
            where="data.validation_share",
            got=f"validation {data.validation_share:g} + test {data.test_share:g}",
            allowed="together below 1",
            do="lower the shares, or give data.validation and data.test",
        )
    for split, given in (("validation", data.validation), ("test", data.test)):
        if given:
            because = f"data.{split} given"
            yield from no_effect("data", data, (f"{split}_share",), because, f"remove it, or remove data.{split}")
    places: dict[str, list[str]] = {}
    named = (("train", data.train), ("validation", data.validation), ("test", data.test))
    for place, paths in (*named, ("mixture", [part.path for part in data.mixture])):
        for path in paths:
            places.setdefault(path, []).append(f"data.{place}")
    for path, found in places.items():
        if len(found) > 1:
            yield Problem(
                what="is named twice",
                where=found[-1],
                got=f"{path} in {' and '.join(found)}",
                allowed="each source in one place: a test on rows that were trained on says nothing",
                do="remove one of them; splits that are not given are made",
            )


def legal_rules(config: Config) -> Iterator[Problem]:
    """Yield what is wrong with the choice of built-in legal tasks."""
    if config.data.kind != "legal":
        return
    tasks = config.data.tasks
    if not tasks:
        yield Problem(
            what="no task chosen",
            where="data.tasks",
            got="[]",
            allowed=", ".join(LEGAL_TASKS),
            do="data.tasks=[clause_type]",
        )
    for task in dict.fromkeys(tasks):
        if task not in LEGAL_TASKS:
            known = tuple(LEGAL_TASKS)
            yield not_among(
                "unknown legal task", where="data.tasks", got=task, allowed=known, otherwise="choose from these"
            )
        elif config.task.name not in (*LEGAL_TASKS[task], "chat"):
            wanted = LEGAL_TASKS[task][0]
            yield Problem(
                what=f"does not fit the legal task {task}",
                where="task.name",
                got=config.task.name,
                allowed=f"{wanted}, or chat for several tasks together",
                do=f"task={wanted}",
            )
    if len(tasks) != len(set(tasks)):
        yield Problem(what="names a task twice", where="data.tasks", got=str(tasks), do="name each task once")
