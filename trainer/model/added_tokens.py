"""Tokens that a base model does not have: its folder again, with a larger vocabulary.

The larger model is written once, before any rank starts, so that everything after it (loading in slices, the comparison
of exports with their base) meets an ordinary model folder. Files without embeddings are links to the original's. Rows
of new tokens begin as the mean of the rows of the old vocabulary: every new token is then about as likely as the
average old one, where random rows could be likelier than any (https://nlp.stanford.edu/~johnhew/vocab-expansion.html).
"""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AddedToken, AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from trainer.console import say
from trainer.errors import ModelError
from trainer.fingerprint import digest
from trainer.model.builtin import publish
from trainer.model.folder import TOKENIZER_FILES, describe_folder, read_config, weight_files
from trainer.model.load import load_tokenizer
from trainer.samples import BaseModel

FORMAT = 1
"""Counted up when the making of the folder changes, so that an old one is not taken for a new one."""
REWRITTEN = (*TOKENIZER_FILES, "config.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
             "chat_template.jinja")  # fmt: skip


def with_added_tokens(base: BaseModel, cache: Path, *, tokens: Sequence[str], special: Sequence[str]) -> BaseModel:
    """``base`` with ``tokens`` in its vocabulary, and ``special`` ones, which text of the rows never becomes.

    The result's ``published`` is the folder of ``base``, its ``added_tokens`` are the ids in the order given.

    Raises:
        ModelError: a token that is there already, embeddings that cannot be found, or no space.
    """
    key = digest([FORMAT, base.sha256, list(tokens), list(special)])
    original, final = Path(base.directory), cache / "models" / f"added-{key[:12]}"
    tokenizer = load_tokenizer(original)
    size = len(tokenizer)
    ids = _add(tokenizer, tokens, special)
    if any(not file.exists() for file in final.glob("*")):  # links, and the original has moved
        shutil.rmtree(final)
    if not final.is_dir():
        publish(final, lambda folder: _write(original, folder, tokenizer, size, ids))
    found = describe_folder(
        final, name=base.name, revision=base.revision, trust_remote_code=False, attribution=base.attribution
    )
    say(f"{len(ids)} tokens added to the vocabulary of {base.name}; their rows begin as the mean of the others")
    return replace(found, license=base.license, published=base.directory, added_tokens=ids)


def embedding_names(directory: Path) -> list[set[str]]:
    """Names of the matrices with a row per token, each with those that share its tensor: embeddings, output layer.

    Raises:
        ModelError: the output layer adds something to its product, which would need rows as well.
    """
    config = AutoConfig.from_pretrained(str(directory), local_files_only=True)
    with torch.device("meta"):
        model = cast(PreTrainedModel, AutoModelForCausalLM.from_config(config))
    head = cast(nn.Linear, model.get_output_embeddings())
    if getattr(head, "bias", None) is not None:
        raise ModelError(
            "tokens cannot be added to a model whose output layer has a bias",
            where="model.add_tokens",
            got=type(model).__name__,
            do="use tokens that the model has",
        )
    groups: dict[int, set[str]] = {}
    wanted = {id(cast(nn.Embedding, model.get_input_embeddings()).weight), id(head.weight)}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in wanted:
            groups.setdefault(id(parameter), set()).add(name)
    return list(groups.values())


def _add(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str], special: Sequence[str]) -> list[int]:
    """Add them to ``tokenizer``; returns their ids."""
    known = tokenizer.get_vocab()
    if there := [token for token in (*tokens, *special) if token in known]:
        raise ModelError(
            "is in the vocabulary already",
            where="model.add_tokens" if there[0] in tokens else "model.add_special_tokens",
            got=", ".join(there),
            allowed="tokens that the model does not have",
            do="remove it",
        )
    tokenizer.add_tokens(list(tokens))
    control: list[str | AddedToken] = [AddedToken(token, special=True, normalized=False) for token in special]
    tokenizer.add_tokens(control, special_tokens=True)
    return [cast(int, tokenizer.convert_tokens_to_ids(token)) for token in (*tokens, *special)]


def _write(original: Path, folder: Path, tokenizer: PreTrainedTokenizerBase, size: int, ids: Sequence[int]) -> None:
    """Fill ``folder``. ``size``: tokens before; their rows make the mean."""
    names = embedding_names(original)
    files = {file: _names_in(file) for file in weight_files(original)}
    stored = {name for names_of_file in files.values() for name in names_of_file}
    if lost := [group for group in names if not group & stored]:
        raise ModelError(
            "the weights of this model have other names in its files: tokens cannot be added to it",
            where=str(original),
            got=f"no {min(lost[0])}",
            do="use tokens that the model has",
        )
    grown = set().union(*names)
    rows = 0
    for file, inside in files.items():
        if not grown & inside:
            (folder / file.name).symlink_to(file.resolve())
            continue
        tensors = load_file(file)
        for name in grown & inside:
            tensors[name] = _with_rows(tensors[name], size, ids)
            rows = len(tensors[name])
        save_file(tensors, folder / file.name, metadata={"format": "pt"})
    tokenizer.save_pretrained(folder)
    text = json.dumps(_with_vocabulary(read_config(original), rows), indent=2, ensure_ascii=False)
    (folder / "config.json").write_text(text + "\n", "utf-8")
    for other in original.iterdir():
        if other.is_file() and other.name not in REWRITTEN and not (folder / other.name).exists():
            os.symlink(other.resolve(), folder / other.name)


def _with_rows(matrix: torch.Tensor, size: int, ids: Sequence[int]) -> torch.Tensor:
    """``matrix`` [rows, H] with the mean of its first ``size`` rows at ``ids``, which may lie beyond its end."""
    mean = matrix[:size].mean(0, dtype=torch.float32).to(matrix.dtype)
    more = max(0, max(ids) + 1 - len(matrix))
    grown = torch.cat([matrix, mean.expand(more, -1)])
    grown[list(ids)] = mean
    return grown


def _with_vocabulary(config: Mapping[str, Any], rows: int) -> dict[str, Any]:
    """``config.json`` for so many rows, where the size of the vocabulary stands in it."""
    inner = config.get("text_config")
    changed = {**config}
    if isinstance(inner, dict):
        changed["text_config"] = {**cast(dict[str, Any], inner), "vocab_size": rows}
    if "vocab_size" in config or not isinstance(inner, dict):
        changed["vocab_size"] = rows
    return changed


def _names_in(file: Path) -> set[str]:
    with safe_open(file, framework="pt") as opened:
        return set(opened.keys())
