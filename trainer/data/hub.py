"""Datasets on the Hugging Face Hub, pinned: a branch is resolved to a commit once, and only that commit is read.

Without the pin a run could not be repeated after the owner of the dataset changed it. Download, caching and the file
formats are the business of ``datasets``; code that comes with a dataset is never run.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from huggingface_hub import DatasetCardData, HfApi

# huggingface_hub changed its HTTP library between releases; its own import of the base class follows it.
from huggingface_hub.errors import (
    GatedRepoError,
    HTTPError,  # pyright: ignore[reportPrivateImportUsage]
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from trainer.console import say
from trainer.errors import DataError
from trainer.samples import Origin, Record

HUB_SECONDS = 10.0
"""How long the Hub may take to say at which commit a name is; without a limit it may take for ever."""
_FORM = "hub:ORG/NAME, hub:ORG/NAME/SUBSET, hub:ORG/NAME:SPLIT or hub:ORG/NAME/SUBSET:SPLIT"
_PART = r"[\w][\w.\-]*"
_LOCATION = re.compile(rf"hub:(?P<repository>{_PART}/{_PART})(?:/(?P<subset>[^/:]+))?(?::(?P<split>[^/:]+))?")
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True, slots=True, kw_only=True)
class HubName:
    """A parsed ``hub:`` location. ``subset`` None: the dataset's default configuration."""

    repository: str
    subset: str | None
    split: str


@dataclass(frozen=True, slots=True, kw_only=True)
class HubDataset:
    """A dataset at one commit (40 hex digits). ``license`` is what its card says, "" when it says nothing.

    ``cached``: the Hub did not answer, or refused; only the cache is asked.
    """

    name: HubName
    commit: str
    license: str
    cached: bool = False


def parse(location: str, *, default_split: str) -> HubName:
    """Read ``hub:ORG/NAME[/SUBSET][:SPLIT]``.

    Raises:
        DataError: it has another form.
    """
    match = _LOCATION.fullmatch(location)
    if match is None:
        raise DataError("is not the name of a dataset on the Hub", where=location, allowed=_FORM)
    return HubName(repository=match["repository"], subset=match["subset"], split=match["split"] or default_split)


def resolve(name: HubName, *, revision: str | None, cache: Path) -> HubDataset:
    """Resolve ``revision`` (branch, tag, commit; None: the default branch) to the commit that it is at this moment.

    Without a connection, a full commit is taken as it is; ``datasets`` then finds it in ``cache`` or fails. So is one
    that is in ``cache`` already when the Hub lets nobody in (a token that has expired).

    Raises:
        DataError: no such dataset or revision, no permission, no connection.
    """
    where = f"hub:{name.repository}"
    try:
        info = HfApi().dataset_info(name.repository, revision=revision, timeout=HUB_SECONDS)
    except (GatedRepoError, RepositoryNotFoundError) as error:
        if revision is not None and is_cached(name, revision, cache):
            say(f"the Hub refuses {name.repository} (the name, or the token); commit {revision[:12]} from its cache")
            return HubDataset(name=name, commit=revision, license="", cached=True)
        if not isinstance(error, GatedRepoError):
            raise DataError(
                "is not on the Hub, or is private",
                where=where,
                do="check the spelling; for a private one: hf auth login",
            ) from error
        page = f"https://huggingface.co/datasets/{name.repository}"
        raise DataError("is gated", where=where, do=f"accept its terms at {page}, then: hf auth login") from error
    except RevisionNotFoundError as error:
        raise DataError(
            "has no such revision", where=where, got=f"data.revision={revision}", do="give a branch, a tag or a commit"
        ) from error
    except (HTTPError, OSError) as error:
        if revision is not None and _COMMIT.fullmatch(revision):
            say(f"the Hub cannot be reached; {name.repository} at {revision[:12]} from its cache")
            return HubDataset(name=name, commit=revision, license="", cached=True)
        raise DataError(
            "the Hub cannot be reached",
            where=where,
            got=str(error).splitlines()[0] if str(error) else type(error).__name__,
            do=f"connect, or set data.revision to the full commit of a copy that is already in {cache}",
        ) from error
    if info.sha is None:
        raise DataError("the Hub names no commit for it", where=where, got=f"revision {revision or 'main'}")
    return HubDataset(name=name, commit=info.sha, license=_license(info.card_data))


def is_cached(name: HubName, revision: str, cache: Path) -> bool:
    """Whether rows of the commit ``revision`` are in the cache that ``records`` reads."""
    folder = cache / "hub" / name.repository.replace("/", "___")
    return _COMMIT.fullmatch(revision) is not None and any(folder.glob(f"*/*/{revision}"))


@contextmanager
def _from_cache_alone() -> Iterator[None]:
    """``datasets`` asks nobody: a Hub that is slow would be waited for again and again."""
    from datasets import config

    before, config.HF_HUB_OFFLINE = config.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        config.HF_HUB_OFFLINE = before


def _license(card: object) -> str:
    """The ``license`` of a dataset card; a list is joined. Cards are free text, so anything else counts as none."""
    data: dict[str, Any] = card.to_dict() if isinstance(card, DatasetCardData) else {}
    value = data.get("license")
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value or "")


def records(dataset: HubDataset, *, cache: Path, shown: str) -> Iterator[Record]:
    """Yield the rows of ``dataset``; ``Origin.row`` counts from 1 within its split.

    Raises:
        DataError: no such subset or split, no data in a known format, not reachable and not in ``cache``.
    """
    from datasets import Dataset, load_dataset  # takes seconds to import, and only Hub users need it
    from datasets.exceptions import DatasetsError

    name = dataset.name
    try:
        with _from_cache_alone() if dataset.cached else nullcontext():
            loaded = load_dataset(
                name.repository, name.subset, split=name.split, revision=dataset.commit, cache_dir=str(cache / "hub")
            )
    except (ValueError, DatasetsError, HTTPError, OSError) as error:
        raise DataError(
            "cannot be loaded",
            where=shown,
            got=str(error).strip() or type(error).__name__,
            allowed=_FORM,
            do="choose one of the subsets and splits named above" if "ne of" in str(error) else "check the connection",
        ) from error
    rows = cast(Dataset, loaded)
    if rows.num_rows == 0:
        raise DataError("has no rows", where=shown, got=f"commit {dataset.commit}")
    for number, row in enumerate(rows, start=1):
        yield Record(cast("dict[str, Any]", row), Origin(shown, number))
