import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from model_fixtures import llama, save
from transformers import PreTrainedModel

from trainer.errors import ModelError
from trainer.model import load, precision
from trainer.model.folder import count_elements, describe_folder, weight_files
from trainer.model.load import (
    load_model,
    load_tokenizer,
    matmul_shape,
    resolve_base,
    resolve_dtype,
)

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def folder(tmp_path) -> Path:
    return save(llama(), tmp_path / "model")


def resolve(path, **changes):
    options = {"revision": None, "cache": Path("/nowhere"), "trust_remote_code": False, **changes}
    return resolve_base(str(path), **options)


def refusal(path, **changes):
    with pytest.raises(ModelError) as caught:
        resolve(path, **changes)
    assert caught.value.exit_code == 2
    return str(caught.value)


def edit_config(folder, **changes):
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


class TestFolder:
    def test_is_described(self, folder):
        (folder / "README.md").write_text("---\nlicense: mit\n---\n# x")
        base = resolve(folder)
        assert base.name == "model"
        assert base.directory == str(folder)
        assert base.license == "mit"
        assert base.revision == ""
        assert base.parameters == sum(parameter.numel() for parameter in llama().parameters())
        assert len(base.sha256) == 64

    def test_digest_covers_config_weights_and_tokenizer_and_nothing_else(self, folder):
        first = resolve(folder).sha256
        (folder / "README.md").write_text("# other words")
        assert resolve(folder).sha256 == first
        for name in ("config.json", "tokenizer.json", "chat_template.jinja"):
            path = folder / name
            before = path.read_bytes() if path.exists() else None
            path.write_text('{"model_type": "llama", "changed": 1}')
            assert resolve(folder).sha256 != first, name
            path.write_bytes(before) if before is not None else path.unlink()
        assert resolve(folder).sha256 == first
        weights = folder / "model.safetensors"
        raw = bytearray(weights.read_bytes())
        raw[-1] ^= 1
        weights.write_bytes(raw)
        assert resolve(folder).sha256 != first

    @pytest.mark.parametrize("text", ["no metadata", "---\nlicense: [\n---\n", "---\ntags: [x]\n---\n"])
    def test_a_card_without_a_licence(self, folder, text):
        (folder / "README.md").write_text(text)
        assert resolve(folder).license == ""

    def test_does_not_exist(self, folder):
        text = refusal(folder.parent / "modle")
        assert "model.path: no such model folder" in text
        assert "did you mean 'model'?" in text
        assert "no such model folder" in refusal("./no/such/folder")

    def test_is_a_file(self, folder):
        assert "not a folder" in refusal(folder / "config.json")

    def test_with_a_revision(self, folder):
        assert "a folder has no revisions" in refusal(folder, revision="main")

    def test_empty(self, tmp_path):
        text = refusal(tmp_path)
        assert "a model folder without config.json" in text
        assert "an empty folder" in text

    def test_an_adapter(self, tmp_path):
        (tmp_path / "adapter_config.json").write_text("{}")
        text = refusal(tmp_path)
        assert "this folder is an adapter, not a model" in text
        assert "method.adapter" in text

    @pytest.mark.parametrize(("content", "words"), [("{", "is not JSON"), ("[]", "is not a JSON object")])
    def test_config_unreadable(self, folder, content, words):
        (folder / "config.json").write_text(content)
        assert words in refusal(folder)

    def test_without_weights(self, folder):
        (folder / "model.safetensors").unlink()
        text = refusal(folder)
        assert "a model folder without weights" in text
        assert "got: config.json, generation_config.json, tokenizer.json" in text
        assert "allowed: model.safetensors" in text

    def test_pickled_weights(self, folder):
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
        text = refusal(folder)
        assert "the weights are pickled: reading them can run code" in text
        assert "pytorch_model.bin" in text
        assert "save_pretrained" in text

    def test_shards(self, tmp_path):
        model = llama()
        model.save_pretrained(tmp_path, max_shard_size="100KB")
        (tmp_path / "tokenizer.json").write_text("{}")
        shards = weight_files(tmp_path)
        assert len(shards) > 1
        assert resolve(tmp_path).parameters == sum(parameter.numel() for parameter in model.parameters())
        shards[1].unlink()
        text = refusal(tmp_path)
        assert f"1 of {len(shards)} weight files are missing" in text
        assert shards[1].name in text
        (tmp_path / "model.safetensors.index.json").write_text("[]")
        assert "the index of the weights cannot be read" in refusal(tmp_path)

    @pytest.mark.parametrize(
        "damage",
        [
            lambda raw: raw[:-10],
            lambda raw: raw[:4],
            lambda raw: b"version https://git-lfs.github.com/spec/v1\noid sha256:1234\n",
            lambda raw: struct.pack("<Q", 3) + b"abc",
            lambda raw: struct.pack("<Q", 8) + b'{"a": 1}',
        ],
    )
    def test_damaged_weights(self, folder, damage):
        weights = folder / "model.safetensors"
        weights.write_bytes(damage(weights.read_bytes()))
        text = refusal(folder)
        assert "a weight file is damaged or was not downloaded completely" in text
        assert str(weights) in text

    def test_without_tokenizer(self, folder):
        (folder / "tokenizer.json").unlink()
        text = refusal(folder)
        assert "a model folder without a tokenizer" in text
        assert "tokenizer.json, tokenizer.model" in text

    def test_attention_that_cannot_be_packed(self, folder):
        edit_config(folder, attn_logit_softcapping=50.0)
        assert "its attention scores are soft-capped" in refusal(folder)

    def test_of_an_unknown_kind(self, folder):
        edit_config(folder, model_type="lama")
        text = refusal(folder)
        assert "transformers does not know this kind of model" in text
        assert "did you mean 'llama'?" in text

    def test_with_code_of_its_own(self, folder):
        edit_config(folder, model_type="mine", auto_map={"AutoModelForCausalLM": "mine.Model"})
        text = refusal(folder)
        assert "this model comes with code of its own, which is not run unless you say so" in text
        assert resolve(folder, trust_remote_code=True).name == "model"

    def test_elements_of_a_file_without_tensors(self, tmp_path):
        file = tmp_path / "x.safetensors"
        file.write_bytes(struct.pack("<Q", 2) + b"{}")
        assert count_elements(file) == 0


class TestBuiltinNames:
    def test_unknown(self):
        text = refusal("builtin:tinny")
        assert "no such built-in model" in text
        assert "did you mean 'builtin:tiny'?" in text

    def test_with_a_revision(self):
        assert "a built-in model has no revisions" in refusal("builtin:tiny", revision="main")

    def test_tiny(self, tmp_path):
        base = resolve("builtin:tiny", cache=tmp_path, tiny_texts=["some words"], seed=3)
        assert base.name == "builtin:tiny"
        assert "randomly initialised" in base.attribution
        assert Path(base.directory).parent == tmp_path / "models"


def hub_error(kind):
    """The error without the HTTP response that its constructor wants."""
    return kind.__new__(kind)


class FakeHub:
    """What the Hub answers: ``info`` and ``local`` are exceptions to raise, or None for success."""

    def __init__(self, snapshot: Path, folder: Path) -> None:
        self.info: Exception | None = None
        self.local: Exception | None = None
        self.asked: list[tuple] = []
        self.sha = COMMIT
        self._snapshot, self._folder = snapshot, folder

    def model_info(self, name, revision, timeout):
        assert timeout <= 10, "a Hub that never answers is not waited for"
        self.asked.append((name, revision))
        if self.info is not None:
            raise self.info
        return self

    def download(self, name, *, revision, allow_patterns, local_files_only=False):
        self.asked.append((revision, local_files_only, "*.py" in allow_patterns, "*.bin" in allow_patterns))
        if local_files_only and self.local is not None:
            raise self.local
        if not self._snapshot.exists():
            self._folder.rename(self._snapshot)
        return str(self._snapshot)


class TestHub:
    @pytest.fixture
    def hub(self, monkeypatch, folder):
        fake = FakeHub(folder.parent / COMMIT, folder)
        monkeypatch.setattr(load, "HfApi", lambda: fake)
        monkeypatch.setattr(load, "snapshot_download", fake.download)
        return fake

    def test_the_commit_is_resolved_first(self, hub, capsys):
        base = resolve("org/model", revision="main")
        assert base.name == "org/model"
        assert base.revision == COMMIT
        assert hub.asked == [("org/model", "main"), (COMMIT, False, False, False)]
        assert "base model org/model at 0123456789ab from the Hub" in capsys.readouterr().out

    def test_code_only_from_a_pinned_revision(self, hub):
        text = refusal("org/model", trust_remote_code=True)
        assert "code from the Hub is only run from a pinned revision" in text
        assert resolve("org/model", trust_remote_code=True, revision=COMMIT).revision == COMMIT
        assert hub.asked[-1] == (COMMIT, False, True, False)

    @pytest.mark.parametrize(
        ("kind", "words"),
        [
            (GatedRepoError, "this model is gated"),
            (RepositoryNotFoundError, "no such model on the Hub"),
            (RevisionNotFoundError, "no such revision of this model"),
        ],
    )
    def test_refused(self, hub, kind, words):
        hub.info, hub.local = hub_error(kind), LocalEntryNotFoundError("nothing")
        text = refusal("org/model", revision="v9")
        assert words in text
        assert "org/model@v9" in text
        assert all(only_local for _, only_local, *_ in hub.asked[1:]), "nothing is downloaded"

    @pytest.mark.parametrize("kind", [GatedRepoError, RepositoryNotFoundError])
    def test_refused_and_cached(self, hub, capsys, kind):
        """A token that has expired is no reason to lose a run whose model is here."""
        hub.info = hub_error(kind)
        assert resolve("org/model", revision="v9").revision == COMMIT
        said = "the Hub refuses it (the name, or the token); base model org/model at 0123456789ab from its cache"
        assert said in capsys.readouterr().out

    def test_not_a_hub_id(self):
        assert "neither a folder nor a Hub id" in refusal("no--such..id")

    def test_offline_and_cached(self, hub, capsys):
        hub.info = OfflineModeIsEnabled("offline")
        assert resolve("org/model").revision == COMMIT
        assert (
            "the Hub cannot be reached; base model org/model at 0123456789ab from its cache" in capsys.readouterr().out
        )

    def test_offline_and_not_cached(self, hub):
        hub.info, hub.local = OfflineModeIsEnabled("offline"), LocalEntryNotFoundError("nothing")
        text = refusal("org/model")
        assert "the Hub cannot be reached and the model is not in its cache" in text
        assert "builtin:smollm2-135m-instruct needs no Hub" in text


class TestLoadModel:
    def test_weights_and_settings(self, folder):
        model = load_model(folder, dtype=torch.bfloat16)
        assert model.dtype == torch.bfloat16
        assert model.config._attn_implementation == "trimtab_packed"
        assert model.config.use_cache is False
        for (name, value), reference in zip(model.state_dict().items(), llama().state_dict().values(), strict=True):
            assert torch.equal(value, reference.bfloat16()), name

    def test_the_padding_token_learns_its_embedding(self, folder):
        """It is often the end of a turn; torch would leave its row without a gradient."""
        model = load_model(folder, dtype=torch.float32)
        embedding: Any = model.get_input_embeddings()
        embedding(torch.tensor([0])).sum().backward()
        assert torch.count_nonzero(embedding.weight.grad[0]) > 0

    def test_missing_tensors_are_not_made_up(self, folder):
        edit_config(folder, num_hidden_layers=3)
        with pytest.raises(ModelError, match="some would have been filled with random values") as caught:
            load_model(folder, dtype=torch.float32)
        assert "model.layers.2" in str(caught.value)

    def test_tensors_of_another_shape(self, folder):
        edit_config(folder, intermediate_size=96)
        with pytest.raises(ModelError):
            load_model(folder, dtype=torch.float32)

    def test_not_a_language_model(self, folder):
        edit_config(folder, model_type="vit")
        with pytest.raises(ModelError, match="the model cannot be loaded"):
            load_model(folder, dtype=torch.float32)

    def test_a_tokenizer_that_cannot_be_read(self, folder):
        with pytest.raises(ModelError, match="the tokenizer cannot be loaded"):
            load_tokenizer(folder)

    def test_attention_dropout_can_be_switched_off(self, folder):
        edit_config(folder, attention_dropout=0.1)
        assert load_model(folder, dtype=torch.float32).config.attention_dropout == 0.1
        assert load_model(folder, dtype=torch.float32, dropout=False).config.attention_dropout == 0.0

    def test_loaded_is_a_transformers_model(self, folder):
        assert isinstance(load_model(folder, dtype=torch.float32), PreTrainedModel)

    def test_matmul_shape(self, folder):
        assert matmul_shape(folder) == (64, 128)

    def test_describe_keeps_the_attribution(self, folder):
        base = describe_folder(folder, name="n", revision="r", trust_remote_code=False, attribution="by us")
        assert (base.name, base.revision, base.attribution) == ("n", "r", "by us")


class TestDtype:
    cpu = torch.device("cpu")

    def test_as_configured(self):
        assert resolve_dtype("bfloat16", self.cpu) == ("bfloat16", "as configured")

    def test_auto_measures(self):
        name, reason = resolve_dtype("auto", self.cpu, hidden_size=64, intermediate_size=128)
        assert name in ("float32", "bfloat16")
        assert "measured on this CPU at 512 x 64 x 128: float32 " in reason

    @pytest.mark.parametrize(
        ("fast", "name"), [(0.5, "bfloat16"), (0.8, "bfloat16"), (0.9, "float32"), (3.0, "float32")]
    )
    def test_a_tie_goes_to_float32(self, fast, name):
        chosen, reason = precision.choose_cpu_dtype(float32_seconds=1.0, bfloat16_seconds=fast, shape=(1000, 10**6))
        assert chosen == name
        assert "float32 1024, bfloat16" in reason

    def test_unknown(self):
        with pytest.raises(ModelError, match="unknown dtype") as caught:
            resolve_dtype("bfloat61", self.cpu)
        assert "did you mean 'bfloat16'?" in str(caught.value)

    def test_float16_on_a_cpu(self):
        with pytest.raises(ModelError, match="float16 is not offered on a CPU"):
            resolve_dtype("float16", self.cpu)

    @pytest.mark.parametrize(("supported", "name"), [(True, "bfloat16"), (False, "float32")])
    def test_on_a_gpu(self, monkeypatch, supported, name):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: supported)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Card 1")
        chosen, reason = resolve_dtype("auto", torch.device("cuda"))
        assert chosen == name
        assert "Card 1" in reason
        if not supported:
            with pytest.raises(ModelError, match="Card 1 has no bfloat16"):
                resolve_dtype("bfloat16", torch.device("cuda"))
