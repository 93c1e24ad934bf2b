"""A whole run whose chat template needs a token that the base does not have: sharded, exported, verified."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from cli_fixtures import trainer
from layout_fixtures import ALONE, METHODS, SMOKE, again, answers, assert_equal, tensors

from trainer.model.builtin import CHAT_TEMPLATE
from trainer.paths import RunFolder

TOKEN = "<|clause|>"
STEPS = "optim.max_steps=12"
needs_deepspeed = pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed (.[deepspeed])")
pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("layout", "method"), [("fsdp", "lora"), ("fsdp", "full"), pytest.param("zero3", "full", marks=needs_deepspeed)]
)
def test_its_rows_are_trained_and_arrive(tmp_path: Path, layout: str, method: str) -> None:
    (tmp_path / "turns.jinja").write_text(CHAT_TEMPLATE.replace("<|im_start|>", TOKEN))
    folder = RunFolder(tmp_path / "run")
    words = [f"model.add_special_tokens=['{TOKEN}']", "model.chat_template=turns.jinja", *METHODS[method], STEPS]
    ended = trainer(tmp_path, *SMOKE, *words, f"parallel={layout}", "launch.processes=2")
    assert ended.code == 0, ended.out + ended.err
    base = json.loads(folder.prepared_json.read_text())["base"]
    (token,) = base["added_tokens"]
    golden = json.loads((folder.merged / "inference.json").read_text())["golden"]
    assert all(token in one["prompt_ids"] for one in golden)

    exported, answered = tensors(folder), answers(folder)
    embeddings = exported["merged/model.safetensors:model.embed_tokens.weight"]
    assert len(embeddings) == token + 1
    assert not torch.allclose(embeddings[token], embeddings[:token].mean(0), atol=1e-3), "its row was not trained"
    again(tmp_path, folder, [*ALONE, *words])
    assert_equal(tensors(folder), exported)
    assert answers(folder) == answered
    if method == "full":
        return
    config = json.loads((folder.adapter / "adapter_config.json").read_text())
    assert config["trainable_token_indices"] == {"model.embed_tokens": [token]}
    assert config["base_model_name_or_path"] == base["published"] != base["directory"]
    assert "base.resize_token_embeddings(" in folder.card.read_text("utf-8")
