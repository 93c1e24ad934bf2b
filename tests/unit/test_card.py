"""The card says what the lineage says, in words that survive hostile data; its code runs as printed."""

import dataclasses
import re
from pathlib import Path
from typing import cast

import pytest
import torch
from export_fixtures import base_folder, inference_of, tuned_lora, write_run
from huggingface_hub import ModelCard, ModelCardData

from trainer.config import Config, DataConfig, MethodConfig, RunConfig, TaskConfig
from trainer.cost.ledger import Account, Spell
from trainer.cost.sums import Factors, cost_of
from trainer.errors import RunError
from trainer.export.card import main, render_card, write_cards
from trainer.export.comparison import Comparison, Rounding, TensorComparison
from trainer.export.lineage import (
    CodeRecord,
    DataRecord,
    EnvironmentRecord,
    FileRecord,
    Lineage,
    SplitRecord,
    StageRecord,
    TrainingRecord,
)
from trainer.export.markdown import code, escape, table
from trainer.export.weights import export_adapter, export_merged, merge
from trainer.markers import is_current
from trainer.paths import RunFolder
from trainer.plan import stage_inputs
from trainer.samples import BaseModel, Dropped, EvaluationRecord, SourceInfo

GOLDEN = Path(__file__).parents[1] / "golden" / "card"
SPELL = Spell(stage="train", began="2026-05-01T12:56:00+00:00", rank=0, seconds=193.4, core_seconds=380.0)
TENSORS = TensorComparison(compared=272, adapted=105, steps=0.0)
ROUNDING = Rounding(difference=0.0832, mean=0.0211, answers=8, same_answers=8)


def evaluation(exact: float, **more: float) -> EvaluationRecord:
    metrics = {"exact_match": exact, "accuracy": exact, "macro_f1": exact * 0.9, "valid_labels": 1.0, "stopped": 1.0}
    return EvaluationRecord(
        task="classification",
        rows=189,
        metrics=metrics | more,
        by_slice={
            "label": {
                "termination": {"rows": 20.0, "exact_match": 0.95},
                "warranty | <b>": {"rows": 12.0, "exact_match": 0.25},
                "rare": {"rows": 2.0, "exact_match": 0.0},
            }
        },
        loss=0.28 if exact else 5.4,
        targets=900,
        seconds=36.0,
    )


def header_of(text: str) -> ModelCardData:
    """The YAML header as the Hub's own library reads it."""
    return cast(ModelCardData, ModelCard(text).data)


def comparison(name: str, **changes: object) -> Comparison:
    parts: dict[str, object] = {
        "name": name,
        "prompts": 8,
        "equal": 8,
        "near_ties": 0,
        "stopped": 8,
        "difference": 0.01,
        "mean": 0.001,
        "tolerance": 0.002,
        "base_difference": 3.0,
        "base_mean": 1.0,
    }
    return Comparison(**(parts | changes))  # type: ignore[arg-type]


def lineage(**changes: object) -> Lineage:
    config = Config(
        run=RunConfig(name="legal_lora"),
        data=DataConfig(kind="legal", tasks=["clause_type"]),
        task=TaskConfig(name="classification", max_new_tokens=8),
        method=MethodConfig(rank=8, alpha=16.0, targets=["q_proj", "down_proj"], layers="15:"),
    )
    parts: dict[str, object] = {
        "format": 1,
        "created": "2026-05-01T13:30:00+00:00",
        "name": "legal_lora",
        "identity": "0123456789",
        "base": BaseModel(
            name="builtin:smollm2-135m-instruct",
            directory="/models/smollm2",
            revision="",
            sha256="b1" * 32,
            license="apache-2.0",
            attribution="SmolLM2-135M-Instruct by Hugging Face, Apache-2.0.",
            parameters=134_515_008,
        ),
        "data": DataRecord(
            sources=[
                SourceInfo(
                    name="licensedcode-data",
                    location="package licensedcode-data 32.1.0: clause_type",
                    sha256="d1" * 32,
                    rows=765,
                    revision="32.1.0",
                    license="CC-BY-4.0",
                    attribution="Derived from licensedcode-data, Copyright (c) nexB Inc. and others.",
                )
            ],
            splits={
                "train": SplitRecord(
                    rows=480, documents=480, tokens=88_139, targets=1800, longest=293, sha256="1" * 64
                ),
                "test": SplitRecord(rows=189, documents=189, tokens=40_000, targets=900, longest=300, sha256="2" * 64),
            },
            splits_sha256="5a" * 32,
            dropped=[Dropped(reason="no answer", count=3, first=["a:1"])],
            truncated=0,
            labels=["termination", "warranty"],
        ),
        "dtype": "bfloat16",
        "dtype_reason": "measured: 3 times faster",
        "stop_token_ids": [2],
        "world_size": 1,
        "strategy": "single",
        "training": TrainingRecord(
            steps=60,
            tokens=88_139,
            epochs=1.0,
            last_loss=0.31,
            best_validation_loss=0.2672,
            best_step=54,
            tokens_per_second=451.3,
            targets=1800,
        ),
        "evaluations": {"zero_shot": evaluation(0.0, valid_labels=0.0), "tuned": evaluation(0.7672)},
        "stages": {
            "train": StageRecord(seconds=193.4, finished="2026-05-01T13:00:00+00:00", summary={}),
        },
        "verification": [
            comparison("adapter", equal=8, difference=0.0002),
            comparison("merged", equal=7, near_ties=1, difference=0.0001, tensors=TENSORS, rounding=ROUNDING),
        ],
        "exports": {
            "adapter": {"adapter_model.safetensors": FileRecord(size=4_900_000, sha256="a" * 64)},
            "merged": {"model.safetensors": FileRecord(size=269_000_000, sha256="c" * 64)},
        },
        "environment": EnvironmentRecord(
            python="3.11.9",
            platform="Linux",
            cores=2,
            cpu="A CPU @ 2.0 GHz",
            device="cpu",
            code=CodeRecord(version="0.1.0", commit="c0ffee" * 6 + "c0ff", dirty=False),
            packages={"torch": "2.13.0", "transformers": "5.23.0"},
        ),
        "config": config,
        "cost": cost_of(Account([SPELL]), Factors()),
    }
    return Lineage(**(parts | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["run", "adapter", "merged"])
def test_the_card_is_as_recorded(kind, request: pytest.FixtureRequest):
    """A change of the card is a change of a public document: look at it, then delete the record and run again."""
    record = GOLDEN / f"{kind}.md"
    found = render_card(lineage(), kind)
    if not record.exists():
        record.parent.mkdir(parents=True, exist_ok=True)
        record.write_text(found, encoding="utf-8")
        pytest.fail(f"there was no record; wrote {record}: read it and commit it")
    assert found == record.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("kind", "relation", "library"), [("adapter", "adapter", "peft"), ("merged", "finetune", "transformers")]
)
def test_the_hub_reads_its_header(kind, relation, library):
    parsed = header_of(render_card(lineage(), kind))
    assert parsed.base_model == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert (parsed.get("base_model_relation"), parsed.library_name, parsed.license) == (relation, library, "apache-2.0")
    assert parsed.metrics == ["exact_match", "accuracy", "f1"]
    results = {(result.metric_type, result.metric_value) for result in parsed.eval_results or []}
    assert results == {("exact_match", 0.7672), ("accuracy", 0.7672), ("f1", 0.69048)}


def test_numbers_before_and_after_with_their_error():
    text = render_card(lineage(), "run")
    assert "| exact match | 0.000 | 0.767 ± 0.031 |" in text
    assert "| loss (nats per answer token) | 5.400 | 0.280 |" in text
    assert "its exact match is 0.767; that of the base model without tuning is 0.000." in text


def test_the_worst_large_slice_is_named_and_escaped():
    text = render_card(lineage(), "run")
    assert "Weakest slice: label = warranty \\| &lt;b&gt;, exact match 0.250 on 12 rows." in text
    assert "<b>" not in text


def test_weaknesses_follow_the_figures():
    plain = render_card(lineage(), "run")
    assert "not better than the base model" not in plain
    assert "did not stop by themselves" not in plain
    worse = lineage(
        evaluations={"zero_shot": evaluation(0.5), "tuned": evaluation(0.5, stopped=0.9, valid_labels=0.95)}
    )
    text = render_card(worse, "run")
    assert "It is not better than the base model at exact match on the test rows." in text
    assert "10.0% of its answers did not stop by themselves" in text
    assert "5.0% of its answers on the test rows are none of the labels." in text


def test_what_it_cost_is_in_the_header_as_the_hub_reads_it_and_in_a_section():
    gpu = dataclasses.replace(SPELL, gpus=1, gpu="NVIDIA H100", gpu_joules=2e6, gpu_meter="counter", seconds=3600.0)
    factors = Factors(price_per_gpu_hour=2.5, carbon_g_per_kwh=100.0, pue=1.0, cpu_watts_per_core=0.0)
    text = render_card(lineage(cost=cost_of(Account([gpu, gpu], unreadable=1), factors)), "run")
    told = header_of(text).get("co2_eq_emissions")
    assert told["emissions"] == 111.1
    assert (told["training_type"], told["hardware_used"]) == ("fine-tuning", "1 x NVIDIA H100")
    assert told["source"].startswith("trimtab: energy measured; 100 g/kWh, pue 1, ")
    assert "| GPU-hours | 2 |" in text
    assert "| tokens | 88,139 trained, 1,800 of them carried loss |" in text
    assert "| energy of the devices | 1.11 kWh, measured |" in text
    assert "| price | 5.00, at 2.5 a GPU-hour |" in text
    assert "- 1 line(s) of the ledger were left half written" in text


def test_energy_that_is_not_known_is_not_in_the_header():
    silent = cost_of(Account([dataclasses.replace(SPELL, gpus=1, gpu="NVIDIA H100")]), Factors())
    text = render_card(lineage(cost=silent), "run")
    assert header_of(text).get("co2_eq_emissions") is None
    assert "| energy of the devices | unknown |" in text
    assert "cost.gpu_watts=W gives a figure" in text
    assert "## Environmental impact\n\nNot recorded." in render_card(lineage(cost=None), "run")


def test_a_hub_base_is_named_with_its_commit():
    base = dataclasses.replace(lineage().base, name="org/base-1b", revision="c0ffee", license="", attribution="")
    text = render_card(lineage(base=base), "adapter")
    assert 'from_pretrained("org/base-1b", revision="c0ffee", dtype="bfloat16")' in text
    assert "# base-1b, tuned: legal\\_lora" in text or "# base-1b, tuned: legal_lora" in text
    assert "Base model: its folder states none." in text
    assert header_of(text).base_model == "org/base-1b"


def test_a_folder_as_base_is_not_a_hub_id():
    base = dataclasses.replace(lineage().base, name="my-model", directory="/data/my-model")
    parsed = header_of(render_card(lineage(base=base), "merged"))
    assert parsed.base_model is None


def test_hub_datasets_are_listed():
    source = SourceInfo(name="org/rows", location="hub:org/rows/subset:train", sha256="d" * 64, rows=5)
    data = dataclasses.replace(lineage().data, sources=[source, source])
    text = render_card(lineage(data=data), "run")
    assert header_of(text).datasets == ["org/rows"]
    assert "Data `org/rows`: not stated." in text


def test_full_fine_tuning_of_texts_without_test_or_export():
    config = dataclasses.replace(Config(), task=TaskConfig(name="text"), method=MethodConfig(name="full"))
    text = render_card(lineage(config=config, evaluations={}, exports={}, stages={}, verification=[]), "run")
    assert "Not measured: the run had no test rows." in text
    assert "Nothing was exported" in text
    assert "The export was not verified." in text
    assert "LoRA of rank" not in text
    assert header_of(text).library_name == "transformers"


def test_a_text_model_is_loaded_without_a_template():
    config = dataclasses.replace(Config(), task=TaskConfig(name="text"))
    text = render_card(lineage(config=config), "merged")
    assert "apply_chat_template" not in text
    assert 'tokenizer("...", return_tensors="pt")' in text


def test_a_lower_perplexity_is_the_better_one():
    config = dataclasses.replace(Config(), task=TaskConfig(name="text"))
    good, bad = (
        EvaluationRecord(
            task="text", rows=9, metrics={"perplexity": value}, by_slice={}, loss=2.0, targets=90, seconds=1.0
        )
        for value in (8.0, 12.0)
    )
    better = render_card(lineage(config=config, evaluations={"zero_shot": bad, "tuned": good}), "run")
    assert "its perplexity per token is 8.000; that of the base model without tuning is 12.000." in better
    assert "not better than the base model" not in better
    worse = render_card(lineage(config=config, evaluations={"zero_shot": good, "tuned": bad}), "run")
    assert "It is not better than the base model at perplexity per token on the test rows." in worse


def test_markdown_from_data_is_escaped():
    assert escape("a|b\n<img src=x> *x* [y](z) `q` & \\") == (
        "a\\|b &lt;img src=x&gt; \\*x\\* \\[y\\](z) \\`q\\` &amp; \\\\"
    )
    assert code("a`b|c\nd") == "a'b/c d"
    assert table(["x", "y"], [["1", "2"]]) == "| x | y |\n|---|---|\n| 1 | 2 |"


def test_a_merged_model_that_rounding_changed_has_that_among_its_limitations():
    changed = dataclasses.replace(ROUNDING, same_answers=7)
    text = render_card(lineage(verification=[comparison("merged", tensors=TENSORS, rounding=changed)]), "merged")
    assert "`merged/` is not quite the model that was evaluated: rounding to the stored dtype moved" in text
    assert " An adapter beside it is." in text
    assert "is not quite the model" not in render_card(lineage(), "merged")


def test_no_export_of_a_base_in_4_bits_is_called_the_model_that_was_evaluated():
    config = dataclasses.replace(Config(), method=MethodConfig(name="lora", quantize="nf4"))
    changed = dataclasses.replace(ROUNDING, same_answers=7)
    verification = [comparison("merged", tensors=TENSORS, rounding=changed)]
    text = render_card(lineage(config=config, verification=verification), "merged")
    assert "It was trained and measured on a base in 4 bits; what is exported stands on the base as it was" in text
    assert "| base in training | linear layers in 4 bits (nf4) |" in text
    assert "`merged/` is not quite the model that was evaluated: rounding to the stored dtype moved" in text
    assert "An adapter beside it is." not in text


def test_no_placeholder_is_left():
    for kind in ("run", "adapter", "merged"):
        text = render_card(lineage(), kind)
        assert not re.search(r"\{\w*\}|TODO|TBD|\[More Information Needed\]|None", text.replace("{{", ""))


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # peft asks by the old name
def test_the_code_of_the_cards_runs_as_printed(tmp_path: Path, monkeypatch, capsys):
    base = base_folder(tmp_path / "cache")
    folder = RunFolder(tmp_path / "run")
    model = tuned_lora(base)
    inference = inference_of(model, base)
    export_adapter(
        model, folder.adapter, tokenizer=base, inference=inference, base_reference=str(base), base_revision=""
    )
    export_merged(
        merge(model),
        folder.merged,
        tokenizer=base,
        inference=inference,
        base_directory=base,
        dtype=torch.float32,
        max_shard_gb=5.0,
    )
    plan = write_run(folder, base)
    assert main([str(folder.root)]) == 0
    assert is_current(folder, "card", stage_inputs(plan, "card"))
    assert (folder.adapter / "lineage.json").read_bytes() == folder.lineage_json.read_bytes()
    printed: list[list[str]] = []
    for card in (folder.card, folder.adapter / "README.md", folder.merged / "README.md"):
        monkeypatch.chdir(card.parent)
        printed.append([])
        for block in re.findall(r"```python\n(.*?)```", card.read_text(encoding="utf-8"), flags=re.DOTALL):
            capsys.readouterr()
            exec(compile(block, str(card), "exec"), {})
            printed[-1].append(capsys.readouterr().out)
    assert [len(blocks) for blocks in printed] == [2, 1, 1]
    answers = {text for blocks in printed for text in blocks}
    assert len(answers) == 1  # adapter and merged, from both places, say the same
    assert answers.pop().strip()


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        (None, "(allowed 0.002)."),
        (TENSORS, "; 272 tensors, 105 of them adapted, bit-equal to base plus adapter."),
        (
            dataclasses.replace(TENSORS, steps=1.0),
            "; 272 tensors, 105 of them adapted, equal within 1 steps of rounding",
        ),
        (dataclasses.replace(TENSORS, not_compared="a <b>"), r"; the tensors were not compared (a &lt;b&gt;)."),
    ],
)
def test_the_card_says_whether_tensors_were_compared(tensors, words):
    assert words in render_card(lineage(verification=[comparison("merged", tensors=tensors)]), "merged")


def test_a_card_needs_a_lineage(tmp_path: Path):
    with pytest.raises(RunError, match=r"lineage\.json"):
        write_cards(RunFolder(tmp_path))


def test_the_run_folder_is_needed():
    with pytest.raises(RunError, match="one run folder is needed"):
        main(["a", "b"])
