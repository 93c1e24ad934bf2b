"""What several fields of a config say together: combinations that cannot be meant.

A field that has no effect beside another one is an error too. Ignoring it would let somebody believe that they froze
layers or set a rank. Every rule looks at the config alone; what is on disk is looked at in ``inputs.py``.
"""

import re
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from trainer.config import LEGAL_TASKS, Config, DataConfig, MethodConfig, TaskName
from trainer.errors import Problem, nearest
from trainer.redaction import REDACTED, looks_secret

BUILTIN_MODELS = ("builtin:smollm2-135m-instruct", "builtin:tiny")
HUB_DATA = "hub:"
METRICS: dict[TaskName, tuple[str, ...]] = {
    "classification": ("loss", "exact_match", "accuracy", "macro_f1", "valid_labels"),
    "extraction": ("loss", "exact_match", "token_f1"),
    "summary": ("loss", "exact_match", "rouge1", "rouge2", "rougeL"),
    "chat": ("loss", "exact_match", "token_f1"),
    "text": ("loss",),
}
"""What ``eval.metric`` may be, by task. ``loss`` is better when lower, everything else when higher."""

_LORA_ONLY = ("rank", "alpha", "dropout", "targets", "layers", "rslora", "dora", "adapter")
_FROM_ADAPTER = ("rank", "alpha", "targets", "layers", "rslora", "dora")
_FULL_ONLY = ("freeze_layers", "freeze_embeddings")
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
_LAYERS = re.compile(r"\s*-?\d*\s*:\s*-?\d*\s*")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def check(config: Config) -> list[Problem]:
    """Return every combination of fields that cannot be meant; empty: none."""
    rules = (_run, _model, _data, _splits, _legal, _task, _method, _optim, _packing, _eval, _secrets)
    return [problem for rule in rules for problem in rule(config)]


def is_hub_model(path: str) -> bool:
    """Say whether ``model.path`` can only be a Hub id: no built-in name, and not written like a folder."""
    written_like_folder = path.startswith(("/", ".", "~")) or path.count("/") > 1 or path.endswith("/")
    return not path.startswith("builtin:") and not written_like_folder


def has_validation(config: Config) -> bool:
    """Say whether the run will have validation rows."""
    data = config.data
    return data.kind != "files" or bool(data.validation) or data.validation_share > 0


def _changed(section: Any, names: tuple[str, ...]) -> list[str]:
    """Return those of ``names`` that differ from the default of their dataclass."""
    given, defaults = asdict(section), asdict(type(section)())
    return [name for name in names if given[name] != defaults[name]]


def _no_effect(section: str, values: Any, names: tuple[str, ...], because: str, do: str) -> Iterator[Problem]:
    """Yield a problem for each of ``names`` that was set although it has no effect."""
    given, defaults = asdict(values), asdict(type(values)())
    for name in _changed(values, names):
        yield Problem(
            what=f"has no effect with {because}",
            where=f"{section}.{name}",
            got=_shown(given[name]),
            allowed=f"its default, {_shown(defaults[name])}",
            do=do,
        )


def _shown(value: object) -> str:
    return "null" if value is None else str(value)


def _run(config: Config) -> Iterator[Problem]:
    if not _NAME.fullmatch(config.run.name):
        yield Problem(
            what="is not a folder name",
            where="run.name",
            got=config.run.name,
            allowed="letters, digits, '.', '_' and '-', not starting with a sign",
            do="rename it; run.root and run.dir take paths",
        )


def _model(config: Config) -> Iterator[Problem]:
    model = config.model
    builtin = model.path.startswith("builtin:")
    if builtin and model.path not in BUILTIN_MODELS:
        yield Problem(
            what="unknown built-in model",
            where="model.path",
            got=model.path,
            allowed=", ".join(BUILTIN_MODELS),
            do=nearest(model.path, BUILTIN_MODELS) or "choose one of these, a folder, or a Hub id",
        )
    if model.revision is not None and not is_hub_model(model.path):
        yield Problem(
            what="has no effect: only Hub models have revisions",
            where="model.revision",
            got=f"{model.revision} with model.path={model.path}",
            allowed="null",
            do="remove it, or give a Hub id in model.path",
        )
    if model.trust_remote_code and is_hub_model(model.path) and model.revision is None:
        yield Problem(
            what="runs code that anybody may change tomorrow",
            where="model.trust_remote_code",
            got="true without model.revision",
            allowed="true with a pinned revision",
            do="set model.revision to the commit you have read",
        )
    if model.chat_template is not None and config.task.name == "text":
        yield from _no_effect("model", model, ("chat_template",), "task.name=text", "remove it")


def _data(config: Config) -> Iterator[Problem]:
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
        yield from _no_effect("data", data, ("tasks", "max_characters"), "data.kind=files", "remove it, or data=legal")
    else:
        yield from _no_effect("data", data, (*_FILES_ONLY, *_MADE_SPLITS), f"data.kind={data.kind}", "use data=files")
    if data.kind == "smoke":
        yield from _no_effect("data", data, ("tasks", "max_characters"), "data.kind=smoke", "remove it")
    if data.revision is not None and data.kind == "files" and not any(map(_is_hub_data, data_paths(data))):
        yield Problem(
            what="has no effect: no data comes from the Hub",
            where="data.revision",
            got=data.revision,
            allowed="null",
            do="remove it, or name a data set as hub:ORG/NAME",
        )
    if data.system is not None and config.task.name == "text":
        yield from _no_effect("data", data, ("system",), "task.name=text", "remove it")
    if data.over_long != "split":
        because = f"data.over_long={data.over_long}"
        yield from _no_effect("data", data, ("split_overlap",), because, "add data.over_long=split, or remove it")
    elif data.split_overlap >= config.packing.capacity:
        yield Problem(
            what="chunks would never advance",
            where="data.split_overlap",
            got=f"{data.split_overlap} tokens with packing.capacity={config.packing.capacity}",
            allowed=f"0 to {config.packing.capacity - 1}",
            do="a tenth of the capacity is plenty",
        )


def data_paths(data: DataConfig) -> list[str]:
    """Return every path that the section names, in the order of its fields."""
    return [*data.train, *data.validation, *data.test, *(part.path for part in data.mixture)]


def _is_hub_data(path: str) -> bool:
    return path.startswith(HUB_DATA)


def _splits(config: Config) -> Iterator[Problem]:
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
            yield from _no_effect("data", data, (f"{split}_share",), because, f"remove it, or remove data.{split}")
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


def _legal(config: Config) -> Iterator[Problem]:
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
            yield Problem(
                what="unknown legal task",
                where="data.tasks",
                got=task,
                allowed=", ".join(LEGAL_TASKS),
                do=nearest(task, tuple(LEGAL_TASKS)) or "choose from these",
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


def _task(config: Config) -> Iterator[Problem]:
    task = config.task
    if task.labels and task.name != "classification":
        yield from _no_effect("task", task, ("labels",), f"task.name={task.name}", "task=classification, or remove it")
    repeated = sorted({label for label in task.labels if task.labels.count(label) > 1})
    if repeated:
        yield Problem(what="names a label twice", where="task.labels", got=", ".join(repeated), do="name each once")
    if len(set(task.labels)) == 1:
        yield Problem(
            what="one label leaves nothing to choose",
            where="task.labels",
            got=task.labels[0],
            allowed="two labels or more, or [] for those of the training rows",
            do="add the others",
        )


def _method(config: Config) -> Iterator[Problem]:
    method = config.method
    if method.name == "full":
        do = "method=lora, or remove it (an experiment that sets it: ~method.KEY)"
        yield from _no_effect("method", method, _LORA_ONLY, "method.name=full", do)
        if not config.export.merged:
            yield Problem(
                what="would leave no weights: full fine-tuning has no adapter",
                where="export.merged",
                got="false",
                allowed="true",
                do="export=merged",
            )
        return
    yield from _no_effect("method", method, _FULL_ONLY, "method.name=lora", "method=full, or remove it")
    if method.adapter is not None:
        do = "remove it: the adapter brings its own"
        yield from _no_effect("method", method, _FROM_ADAPTER, "method.adapter given", do)
    if not method.targets:
        yield Problem(
            what="no module would get an adapter",
            where="method.targets",
            got="[]",
            allowed="module names, or all-linear",
            do="method.targets=[all-linear]",
        )
    if "all-linear" in method.targets and len(method.targets) > 1:
        yield Problem(
            what="says both all and some",
            where="method.targets",
            got=", ".join(method.targets),
            allowed="all-linear alone, or names",
            do="remove all-linear, or everything else",
        )
    yield from _layer_range(method)


def _layer_range(method: MethodConfig) -> Iterator[Problem]:
    if method.layers is not None and not _LAYERS.fullmatch(method.layers):
        yield Problem(
            what="is not a range of layers",
            where="method.layers",
            got=method.layers,
            allowed="'15:' (from 15 on), ':8', '4:12', '-10:' (the last ten)",
            do='quote it in YAML: layers: "15:"',
        )


def _optim(config: Config) -> Iterator[Problem]:
    optim = config.optim
    capacity = config.packing.capacity
    if optim.batch_packs is not None and optim.batch_tokens is not None:
        yield Problem(
            what="two answers to how large a batch is",
            where="optim.batch_tokens",
            got=f"batch_packs={optim.batch_packs} and batch_tokens={optim.batch_tokens}",
            allowed="one of them",
            do="set the other one to null: optim.batch_packs=null",
        )
    elif optim.batch_tokens is not None and optim.batch_tokens % capacity:
        below = optim.batch_tokens // capacity * capacity
        yield Problem(
            what="is not a whole number of packs",
            where="optim.batch_tokens",
            got=f"{optim.batch_tokens} with packing.capacity={capacity}",
            allowed=f"a multiple of {capacity}",
            do="optim.batch_tokens=" + " or ".join(str(fitting) for fitting in (below, below + capacity) if fitting),
        )
    if optim.schedule == "constant":
        yield from _no_effect("optim", optim, ("min_lr_ratio",), "optim.schedule=constant", "remove it")


def _packing(config: Config) -> Iterator[Problem]:
    longest = config.task.max_new_tokens
    if config.task.name != "text" and config.eval.batch_tokens <= longest:
        yield Problem(
            what="not even one answer fits into a batch of generation",
            where="eval.batch_tokens",
            got=f"{config.eval.batch_tokens} with task.max_new_tokens={longest}",
            allowed=f"more than {longest}, and the longest prompt on top",
            do="raise eval.batch_tokens",
        )


def _eval(config: Config) -> Iterator[Problem]:
    evaluation = config.eval
    metrics = METRICS[config.task.name]
    if evaluation.metric not in metrics:
        yield Problem(
            what=f"is not measured for task.name={config.task.name}",
            where="eval.metric",
            got=evaluation.metric,
            allowed=", ".join(metrics),
            do=nearest(evaluation.metric, metrics) or "choose one of these",
        )
    elif evaluation.metric != "loss" and evaluation.generate_rows == 0:
        yield Problem(
            what="needs answers, and none are generated during training",
            where="eval.generate_rows",
            got="0",
            allowed=f"1 or more with eval.metric={evaluation.metric}",
            do="eval.generate_rows=100",
        )
    if config.task.name == "text" and evaluation.generate_rows:
        yield from _no_effect("eval", evaluation, ("generate_rows",), "task.name=text", "remove it")
    if evaluation.patience is None:
        yield from _no_effect("eval", evaluation, ("min_improvement",), "eval.patience=null", "add eval.patience")
    if len(set(evaluation.baselines)) != len(evaluation.baselines):
        yield Problem(
            what="names a baseline twice", where="eval.baselines", got=str(evaluation.baselines), do="remove one"
        )
    if not has_validation(config):
        given = asdict(evaluation)
        for name in _changed(evaluation, ("patience", "max_loss", "generate_rows", "metric", "every")):
            yield Problem(
                what="needs validation rows, and there are none",
                where=f"eval.{name}",
                got=f"data.validation_share=0 and data.validation=[] with eval.{name}={given[name]}",
                allowed="a share above 0, or data.validation",
                do="data.validation_share=0.05",
            )


def _secrets(config: Config) -> Iterator[Problem]:
    """Config is copied into run folders, so a secret in it leaks; compose knows the file, a plan made by hand not."""
    sections: dict[str, dict[str, object]] = asdict(config)
    for section, values in sections.items():
        for name, value in values.items():
            if looks_secret(str(value)):
                yield Problem(
                    what="looks like a secret",
                    where=f"{section}.{name}",
                    got=REDACTED,
                    allowed="no secrets in the config: it is written into the run folder",
                    do="set it as an environment variable (HF_TOKEN, ...)",
                )
