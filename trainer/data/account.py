"""Says what became of the rows: how many there are, what was left out and why, what is learnt. Nothing stays silent."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from trainer import console
from trainer.data.rows import Rows
from trainer.data.templates import ChatTemplate
from trainer.data.tokenized import Tokenized
from trainer.samples import Dropped

_SHOWN_LABELS = 12
_SHOWN_SAMPLE = 1200


def say_rows(rows: Rows) -> None:
    """Print sources, recognised shapes, what was left out, findings and the balance of the labels."""
    for source in rows.sources:
        rights = f", {source.license}" if source.license else ""
        revision = f" at {source.revision[:12]}" if source.revision and source.revision not in source.location else ""
        console.say(f"read {source.rows:,} rows: {source.location}{revision}{rights}")
    shapes = sorted(set(rows.shapes.values()))
    console.say(f"shape of the rows: {', '.join(shapes)}")
    if rows.ignored:
        console.say(f"keys of messages that are not used: {', '.join(rows.ignored)}")
    for number, part in enumerate(rows.mixture):
        never = f", {part.left_out} never" if part.left_out else ""
        console.say(f"mixture part {number}: {part.rows} rows, seen {part.used} times in all{never}")
    _say_dropped(rows.dropped)
    for finding in rows.findings:
        console.warn(f"{finding.count} {finding.what}; they are kept ({_named(finding.first, of=finding.count)})")
    _say_balance(rows.balance)


def say_tokens(tokens: Tokenized, template: ChatTemplate | None, tokenizer: PreTrainedTokenizerBase) -> None:
    """Print counts per split, what was left out or cut, the stop tokens, and a row with what is learnt in it marked."""
    report = tokens.report
    origin = "found in the cache" if tokens.found else "made"
    console.say(f"tokens {origin}: {tokens.folder}")
    columns = ("split", "rows", "documents", "tokens", "targets", "longest")
    console.table(
        columns,
        [
            (name, *(f"{n:,}" for n in (info.rows, info.documents, info.tokens, info.targets, info.longest)))
            for name, info in report.splits.items()
        ],
    )
    _say_dropped(report.dropped)
    if report.truncated:
        console.warn(f"{report.truncated} documents were cut at the end to packing.capacity (data.over_long=truncate)")
    if report.chunks:
        console.say(f"{report.over_long} documents above packing.capacity became {report.chunks} chunks")
    if template is not None:
        console.say(f"chat template: {template.name}")
        if "strftime_now" in template.text:
            console.warn("the chat template can write today's date: a prompt may differ from one day to the next")
    names = {token: tokenizer.convert_ids_to_tokens(token) for token in (*report.stop_token_ids, report.pad_token_id)}
    stops = ", ".join(f"{names[token]} ({token})" for token in report.stop_token_ids)
    documents = report.splits["train"].documents
    console.say(f"stop tokens: {stops}; learnt in {report.stops_learnt:,} of {documents:,} training documents")
    console.say(f"padding: {names[report.pad_token_id]} ({report.pad_token_id})")
    if report.pad_token_id in report.stop_token_ids:
        console.say("padding is a stop token too; what is learnt goes by position, so it is learnt all the same")
    console.say(f"a training row; what is learnt stands between » and «:\n{_shortened(report.sample)}")


def _say_dropped(dropped: list[Dropped]) -> None:
    for item in dropped:
        console.warn(f"left out {item.count} rows: {item.reason} ({_named(item.first, of=item.count)})")


def _named(first: Sequence[str], *, of: int) -> str:
    """The first rows of so many."""
    return ", ".join(first) + (", ..." if of > len(first) else "")


def _say_balance(balance: dict[str, dict[str, int]]) -> None:
    for split, counts in balance.items():
        common = sorted(counts.items(), key=lambda entry: -entry[1])
        shown = ", ".join(f"{label} {count}" for label, count in common[:_SHOWN_LABELS])
        more = f", and {len(common) - _SHOWN_LABELS} more" if len(common) > _SHOWN_LABELS else ""
        console.say(f"labels in {split}: {shown}{more}")


def _shortened(sample: str) -> str:
    """Keep the beginning and the end of a long row; the answer is at the end."""
    if len(sample) <= _SHOWN_SAMPLE:
        return sample
    half = _SHOWN_SAMPLE // 2
    return f"{sample[:half]}\n [...]\n{sample[-half:]}"
