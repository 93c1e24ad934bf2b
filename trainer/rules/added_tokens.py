"""Rules of tokens that are added to the vocabulary: they have to be new, told apart, and trained."""

from collections.abc import Iterator
from typing import Any

from trainer.config import Config
from trainer.errors import Problem


def added_tokens(config: Config) -> dict[str, Any]:
    """Return what is added to the vocabulary; nothing where nothing is: the runs of before there was it."""
    both = {"add_tokens": config.model.add_tokens, "add_special_tokens": config.model.add_special_tokens}
    return {name: tokens for name, tokens in both.items() if tokens}


def added_token_rules(config: Config) -> Iterator[Problem]:
    """Yield tokens that are nothing or given twice, and settings under which they would never be learnt."""
    model = config.model
    both = {"model.add_tokens": model.add_tokens, "model.add_special_tokens": model.add_special_tokens}
    given = [token for tokens in both.values() for token in tokens]
    seen: set[str] = set()
    for where, tokens in both.items():
        for token in tokens:
            if not token.strip():
                yield Problem(what="is no token", where=where, got=repr(token), allowed="text", do="remove it")
            elif token in seen:
                yield Problem(
                    what="is given twice", where=where, got=token, allowed="each token once", do="remove one of the two"
                )
            seen.add(token)
    where = next((name for name, tokens in both.items() if tokens), "")
    if where and config.method.freeze_embeddings:
        yield Problem(
            what="would stay untrained: the embeddings are frozen",
            where=where,
            got=f"{', '.join(given)} with method.freeze_embeddings=true",
            allowed="method.freeze_embeddings=false",
            do="method.freeze_embeddings=false, or method=lora, which trains their rows alone",
        )
    if where and config.method.name == "lora" and config.parallel.name == "zero3":
        yield Problem(
            what="cannot train the rows of added tokens beside an adapter: it does not gather them when a model is "
            "called by parts, as for the self-check and for answers",
            where="parallel.name",
            got=f"zero3 with {where}",
            allowed="auto, ddp, fsdp, zero1, zero2",
            do="parallel=fsdp, or method=full",
        )
    if where and model.trust_remote_code:
        yield Problem(
            what="was not tried with a model that brings its own code",
            where=where,
            got=f"{', '.join(given)} with model.trust_remote_code=true",
            allowed="model.trust_remote_code=false",
            do="remove it",
        )
