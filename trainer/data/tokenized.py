"""The tokenised form of a run's rows: made once per content, found again by it, safe to delete.

A folder below the cache holds everything that training reads: an arena per split, the held-out prompts, and an account
of what was made. Its name is a digest of the rows, the tokenizer, the template and every option that has a say, so
another option never meets old tokens. The folder is published by one rename; of two processes that make the same one,
the first wins and the other uses it.
"""

import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import msgspec
import numpy as np
import tokenizers
import transformers
from transformers import PreTrainedTokenizerBase

from trainer.data.chat import ChatEncoder, EncodedRow, marked_sample
from trainer.data.checks import describe, label_of, refuse_if_too_many
from trainer.data.dropped import merge
from trainer.data.length import Fitted, OverLong, View, fit_length
from trainer.data.special_tokens import pad_token, stop_tokens
from trainer.data.splits import SplitName, Splits
from trainer.errors import DataError
from trainer.fingerprint import digest, tree_digest
from trainer.paths import fresh_folder, fsync_directory, write_atomic
from trainer.samples import Conversation, Dropped, EvaluationExample, SplitInfo
from trainer_kernels import ArenaError, ArenaWriter, TokenArena

FORMAT = 1
"""Counted up when the same rows and options would give another folder."""

REPORT = "report.json"
_SAMPLE_CHARACTERS = 4000
_TOKENIZER_PATTERNS = ("tokenizer*", "vocab*", "merges.txt", "*.model", "special_tokens_map.json", "added_tokens.json")


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenOptions:
    """Every option that decides about tokens.

    ``answers``: held-out prompts are wanted (every task but plain text); ``classes``: an answer is its own label.
    """

    capacity: int
    over_long: OverLong
    overlap: int
    loss_on: str
    max_dropped_share: float
    answers: bool
    classes: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenReport:
    """``report.json`` of the folder. ``splits``: name to counts, with the arena's path relative to the folder.

    ``stops_learnt``: training documents in which a stop token is a target. ``longest_prompt``: of the held-out prompts,
    in tokens; 0 without any. ``sample``: a training row as text, what is learnt between » and «.
    """

    splits: dict[str, SplitInfo]
    dropped: list[Dropped]
    over_long: int
    truncated: int
    chunks: int
    stop_token_ids: list[int]
    pad_token_id: int
    stops_learnt: int
    longest_prompt: int
    sample: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokenized:
    """A folder of tokens and its account; ``found``: it was there already."""

    folder: Path
    report: TokenReport
    found: bool

    def split(self, name: SplitName) -> SplitInfo | None:
        """Counts of a split with the full path of its arena; None for a split without rows."""
        info = self.report.splits.get(name)
        return None if info is None else replace(info, arena=str(self.folder / info.arena))


def examples_path(folder: Path, name: SplitName) -> Path:
    """Where the held-out prompts of a split are: one ``EvaluationExample`` per line."""
    return folder / f"{name}.examples.jsonl"


def origins_path(folder: Path, name: SplitName) -> Path:
    """Where the documents of a split's arena come from: one ``file:row`` per line, in the arena's order."""
    return folder / f"{name}.origins.txt"


def content_key(rows: Mapping[str, str], template: str, tokenizer_folder: Path, options: TokenOptions) -> str:
    """Return the digest of everything that the tokens depend on; ``rows``: split to the digest of its rows."""
    files = {file for pattern in _TOKENIZER_PATTERNS for file in tokenizer_folder.glob(pattern) if file.is_file()}
    versions = [transformers.__version__, tokenizers.__version__]
    return digest([FORMAT, dict(rows), template, tree_digest(sorted(files)), asdict(options), versions])


def find_tokens(cache: Path, key: str, *, warn: Callable[[str], None] = lambda text: None) -> Tokenized | None:
    """Return the folder of ``key`` when it is there and whole, by the hashes of its arenas.

    ``warn`` is told what is wrong with one that is there and not whole: it has to be made again.
    """
    folder = folder_of(cache, key)
    try:
        return Tokenized(folder=folder, report=_read_whole(folder), found=True)
    except FileNotFoundError:
        return None
    except (msgspec.DecodeError, ArenaError) as fault:
        words = f"{fault.what} ({fault.got})" if isinstance(fault, ArenaError) else f"{folder / REPORT} ({fault})"
        warn(f"the tokens in the cache are damaged and are made again: {words}")
        return None


def _read_whole(folder: Path) -> TokenReport:
    """The account of ``folder``.

    Raises:
        FileNotFoundError: there is none. It is written last, so such a folder was not made as a whole.
        msgspec.DecodeError: it is damaged.
        ArenaError: an arena that it names is not there, damaged or another one.
    """
    report = msgspec.json.decode((folder / REPORT).read_bytes(), type=TokenReport)
    for info in report.splits.values():
        TokenArena.open(folder / info.arena, expect_sha256=info.arena_sha256)
    return report


def _is_whole(folder: Path) -> bool:
    try:
        _read_whole(folder)
    except (FileNotFoundError, msgspec.DecodeError, ArenaError):
        return False
    return True


def folder_of(cache: Path, key: str) -> Path:
    """Return the folder that ``key`` has in the cache."""
    return cache / "tokens" / key[:20]


def make_tokens(
    splits: Splits,
    encoder: ChatEncoder,
    options: TokenOptions,
    *,
    cache: Path,
    key: str,
    on_progress: Callable[[int], None] = lambda done: None,
) -> Tokenized:
    """Tokenise ``splits`` and publish the folder of ``key``.

    ``on_progress`` is told how many of all rows are tokenised.

    Raises:
        DataError: the template does not fit the rows, a row is too long, too many rows are left out, a split is empty
            in the end, or no document teaches the model to stop.
        OSError: no space, no permission; nothing is left behind.
    """
    folder = folder_of(cache, key)
    folder.parent.mkdir(parents=True, exist_ok=True)
    stage = fresh_folder(folder.parent, f".{folder.name}.")
    try:
        report = _fill(stage, splits, encoder, options, on_progress)
        write_atomic(stage / REPORT, msgspec.json.format(msgspec.json.encode(report), indent=1))
        return Tokenized(folder=_publish(stage, folder), report=report, found=False)
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _publish(stage: Path, folder: Path) -> Path:
    """Rename ``stage``. A folder that is there but not whole was damaged from outside and is replaced."""
    if folder.is_dir() and not _is_whole(folder):
        shutil.rmtree(folder)
    try:
        stage.rename(folder)
    except OSError:
        if not _is_whole(folder):
            raise
    fsync_directory(folder.parent)
    return folder


def _fill(
    stage: Path, splits: Splits, encoder: ChatEncoder, options: TokenOptions, on_progress: Callable[[int], None]
) -> TokenReport:
    parts: dict[SplitName, _Part] = {}
    done = 0
    for name, rows in splits.items():
        if rows:
            parts[name] = _fill_split(
                stage, name, rows, encoder, options, lambda n, before=done: on_progress(before + n)
            )
            done += len(rows)
    train = parts["train"]
    stops = stop_tokens(encoder.tokenizer, train.ends)
    stops_learnt = documents_that_stop(train.arena, stops)
    if not stops_learnt:
        raise _never_stops(encoder.tokenizer, stops)
    return TokenReport(
        splits={name: part.info for name, part in parts.items()},
        dropped=merge(*(part.dropped for part in parts.values())),
        over_long=sum(part.fitted.over_long for part in parts.values()),
        truncated=sum(part.fitted.truncated for part in parts.values()),
        chunks=sum(part.fitted.chunks for part in parts.values()),
        stop_token_ids=stops,
        pad_token_id=pad_token(encoder.tokenizer, stops),
        stops_learnt=stops_learnt,
        longest_prompt=max(part.longest_prompt for part in parts.values()),
        sample=train.sample,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    """One split, written."""

    info: SplitInfo
    arena: TokenArena
    fitted: Fitted
    dropped: list[Dropped]
    ends: list[int]
    longest_prompt: int
    sample: str


def _fill_split(
    stage: Path,
    name: SplitName,
    rows: Sequence[Conversation],
    encoder: ChatEncoder,
    options: TokenOptions,
    on_progress: Callable[[int], None],
) -> _Part:
    times = Counter(row.id for row in rows)
    unique = list({row.id: row for row in rows}.values())
    encoded = encoder.encode(unique, on_progress=on_progress)
    examples = [row.example for row in encoded.rows]
    fitted = fit_length(examples, capacity=options.capacity, over_long=options.over_long, overlap=options.overlap)
    dropped = merge(encoded.dropped, fitted.dropped)
    refuse_if_too_many(dropped, len(unique), options.max_dropped_share)
    kept = [(row, views) for row, views in zip(encoded.rows, fitted.views, strict=True) if views]
    if not kept:
        raise _empty(name, dropped)
    # A row that a mixture repeats is stored once and seen several times.
    arena = _write_arena(stage, name, [(row, views * times[row.conversation.id]) for row, views in kept])
    asked = [row for row, _ in kept if row.prompt_length and name != "train" and options.answers]
    if asked:
        _write_examples(examples_path(stage, name), asked, classes=options.classes)
    return _Part(
        info=SplitInfo(
            rows=sum(times[row.conversation.id] for row, _ in kept),
            documents=arena.num_documents,
            tokens=arena.num_tokens,
            targets=arena.num_targets,
            longest=int(arena.lengths.max()),
            arena=arena.path.name,
            arena_sha256=arena.sha256,
        ),
        arena=arena,
        fitted=fitted,
        dropped=dropped,
        ends=encoded.end_token_ids,
        longest_prompt=max((row.prompt_length for row in asked), default=0),
        sample=marked_sample(encoder.tokenizer, kept[0][0].example)[:_SAMPLE_CHARACTERS],
    )


def _write_arena(stage: Path, name: SplitName, rows: Sequence[tuple[EncodedRow, list[View]]]) -> TokenArena:
    with ArenaWriter(stage / f"{name}.arena") as writer:
        for row, views in rows:
            writer.add(row.example.input_ids, row.example.loss_mask, views)
        arena = writer.close({"split": name})
    origins = "".join(f"{row.example.origin}\n" * len(views) for row, views in rows)
    write_atomic(origins_path(stage, name), origins)
    return arena


def _write_examples(path: Path, rows: Sequence[EncodedRow], *, classes: bool) -> None:
    encoder = msgspec.json.Encoder()
    lines = [encoder.encode(_example(row, classes=classes)) for row in rows]
    write_atomic(path, b"".join(line + b"\n" for line in lines))


def _example(row: EncodedRow, *, classes: bool) -> EvaluationExample:
    conversation = row.conversation
    return EvaluationExample(
        id=conversation.id,
        prompt_ids=row.prompt_ids,
        answer=conversation.answer or row.answer_text,
        label=label_of(conversation) if classes else conversation.label,
        slices=dict(conversation.slices),
    )


def documents_that_stop(arena: TokenArena, stops: Sequence[int]) -> int:
    """Count the documents of ``arena`` in which one of ``stops`` is a target."""
    # The sign bit of a token says that it is not learnt, so a learnt stop token is equal to its id.
    learnt = np.isin(arena.tokens, np.asarray(stops, np.int32))
    before = np.concatenate([[0], np.cumsum(learnt)])
    last = arena.starts + arena.lengths
    first = np.minimum(arena.starts + np.maximum(1, arena.muted), last)
    return int(np.count_nonzero(before[last] > before[first]))


def _empty(name: SplitName, dropped: Sequence[Dropped]) -> DataError:
    return DataError(
        f"no {name} row is left after tokenising",
        where=f"data.{name}",
        got=describe(dropped),
        do="mend the rows named here, or choose another data.over_long or packing.capacity",
    )


def _never_stops(tokenizer: PreTrainedTokenizerBase, stops: Sequence[int]) -> DataError:
    return DataError(
        "no training document teaches the model to stop: in none of them a stop token is learnt",
        where="data.train",
        got=f"stop tokens {', '.join(map(str, tokenizer.convert_ids_to_tokens(list(stops))))}",
        allowed="at least one document that ends with one of them",
        do="choose a larger packing.capacity, or data.over_long=split, so that the ends of answers are not cut away",
    )
