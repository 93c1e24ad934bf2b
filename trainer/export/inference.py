"""How the exported model wants to be asked, and a few answers by which a copy of it can be recognised.

A served model differs from the trained one when template, stop tokens or number format differ. So both export folders
carry all of them, together with golden prompts (``golden.py``): those of ``adapter/`` by the trained model, those of
``merged/`` by the merged model in the dtype it is stored in.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import msgspec
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from trainer.errors import ModelError, RunError
from trainer.export.comparison import Rounding
from trainer.paths import write_atomic

INFERENCE = "inference.json"
FORMAT = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class GoldenPrompt:
    """One prompt and a model's greedy answer.

    ``generated_ids`` (length n) include the stop token if ``stopped``. ``top_ids`` and ``top_log_probs`` [n][5] are
    the likeliest next tokens before each of them and their natural log-probabilities, from one forward pass over
    prompt and answer in ``Inference.golden_dtype``.
    """

    id: str
    prompt_ids: list[int]
    generated_ids: list[int]
    stopped: bool
    text: str
    top_ids: list[list[int]]
    top_log_probs: list[list[float]]


@dataclass(frozen=True, slots=True, kw_only=True)
class TemplateProbe:
    """A conversation as (role, content) turns, and the prompt that the chat template must make of it."""

    turns: list[tuple[str, str]]
    prompt_ids: list[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Inference:
    """``inference.json``.

    ``dtype`` is what the model was trained and evaluated in and what ``merged/`` is stored in, ``dtype_reason`` why.
    ``golden_dtype``: what the log-probabilities of ``golden`` were computed in; ``rounding``: what storing the model in
    ``dtype`` changed (None beside an adapter, which is stored as it was trained).
    ``max_length``: the longest document seen in training, in tokens (quality beyond it was never measured).
    ``system``: the system prompt that rows without one were given. ``chat_template_sha256`` and ``template_probe`` are
    empty for a tokenizer without a template.
    """

    format: int
    base_name: str
    base_revision: str
    base_sha256: str
    dtype: str
    dtype_reason: str
    max_length: int
    system: str | None
    max_new_tokens: int
    stop_token_ids: list[int]
    pad_token_id: int
    chat_template_sha256: str
    template_probe: TemplateProbe | None
    golden_dtype: str
    golden: list[GoldenPrompt]
    rounding: Rounding | None = None


def write_serving_files(folder: Path, *, tokenizer: Path, inference: Inference) -> None:
    """Write tokenizer, chat template, ``generation_config.json`` and ``inference.json`` into ``folder``.

    Raises:
        ModelError: the padding token is a stop token (a batch would stop where it is padded), or there is no stop
            token.
    """
    if not inference.stop_token_ids or inference.pad_token_id in inference.stop_token_ids:
        raise ModelError(
            "the exported model would not know where to stop",
            got=f"stop tokens {inference.stop_token_ids}, padding token {inference.pad_token_id}",
            allowed="at least one stop token, and a padding token that is none",
            do="prepare the run again; a tokenizer needs an end-of-turn token and another one for padding",
        )
    loaded = load_plain_tokenizer(tokenizer)
    loaded.padding_side = "left"  # what batched generation needs; training pads nothing
    loaded.save_pretrained(str(folder))
    _drop_loading_remarks(folder / "tokenizer_config.json")
    generation_config(inference, bos_token_id(loaded)).save_pretrained(str(folder))
    write_atomic(folder / INFERENCE, msgspec.json.format(msgspec.json.encode(inference), indent=2) + b"\n")


def generation_config(inference: Inference, bos: int | None) -> GenerationConfig:
    """Greedy, as the model was evaluated, ending at the template's stop tokens."""
    return GenerationConfig(
        do_sample=False,
        bos_token_id=bos,
        eos_token_id=list(inference.stop_token_ids),
        pad_token_id=inference.pad_token_id,
        max_new_tokens=inference.max_new_tokens,
    )


def load_plain_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in ``folder``, as a reader of the export would load it."""
    return cast(PreTrainedTokenizerBase, AutoTokenizer.from_pretrained(str(folder), local_files_only=True))


def bos_token_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token that opens a document, for tokenizers that have one."""
    return cast(int | None, tokenizer.bos_token_id)


def template_sha256(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of the chat template's text; "" without one."""
    template = tokenizer.chat_template
    return "" if template is None else hashlib.sha256(json.dumps(template).encode()).hexdigest()


def probe_template(tokenizer: PreTrainedTokenizerBase, system: str | None) -> TemplateProbe | None:
    """What the template makes of a small conversation; None without a template."""
    if tokenizer.chat_template is None:
        return None
    turns = [("user", "Does clause 4.2 survive termination?\nAnswer in one word.")]
    if system is not None:
        turns.insert(0, ("system", system))
    return TemplateProbe(turns=turns, prompt_ids=render_prompt(tokenizer, turns))


def render_prompt(tokenizer: PreTrainedTokenizerBase, turns: Sequence[tuple[str, str]]) -> list[int]:
    """Token ids of ``turns`` with the generation prompt after them."""
    messages = [{"role": role, "content": content} for role, content in turns]
    encoded = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)
    return list(cast(dict[str, list[int]], encoded)["input_ids"])


def make_inference(
    *,
    base_name: str,
    base_revision: str,
    base_sha256: str,
    dtype: str,
    dtype_reason: str,
    max_length: int,
    system: str | None,
    max_new_tokens: int,
    stop_token_ids: Sequence[int],
    pad_token_id: int,
    tokenizer: Path,
    golden_dtype: str,
    golden: Sequence[GoldenPrompt],
) -> Inference:
    """``inference.json`` of a run; what the template says is read from the tokenizer folder."""
    loaded = load_plain_tokenizer(tokenizer)
    return Inference(
        format=FORMAT,
        base_name=base_name,
        base_revision=base_revision,
        base_sha256=base_sha256,
        dtype=dtype,
        dtype_reason=dtype_reason,
        max_length=max_length,
        system=system,
        max_new_tokens=max_new_tokens,
        stop_token_ids=list(stop_token_ids),
        pad_token_id=pad_token_id,
        chat_template_sha256=template_sha256(loaded),
        template_probe=probe_template(loaded, system),
        golden_dtype=golden_dtype,
        golden=list(golden),
    )


def read_inference(folder: Path) -> Inference:
    """Read ``inference.json`` of an export folder.

    Raises:
        RunError: missing, damaged, or of another format.
    """
    path = folder / INFERENCE
    try:
        inference = msgspec.json.decode(path.read_bytes(), type=Inference)
    except (OSError, msgspec.DecodeError) as error:
        raise _unreadable(path, str(error)) from error
    if inference.format != FORMAT:
        raise _unreadable(path, f"format {inference.format}")
    return inference


def _unreadable(path: Path, got: str) -> RunError:
    return RunError(
        "cannot read what an export says about itself",
        where=str(path),
        got=got,
        allowed=f"an {INFERENCE} of format {FORMAT}",
        do="run `python -m trainer export` on this run again",
    )


def _drop_loading_remarks(path: Path) -> None:
    """transformers writes into a tokenizer how it was loaded; that is true of this machine only."""
    config = json.loads(path.read_text(encoding="utf-8"))
    kept = {key: value for key, value in config.items() if key not in ("is_local", "local_files_only")}
    write_atomic(path, json.dumps(kept, indent=2, ensure_ascii=False) + "\n")
