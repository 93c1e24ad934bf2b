"""Rules of the run folder: how it is called, and what must not be written into it."""

import re
from collections.abc import Iterator
from dataclasses import asdict

from trainer.config import Config
from trainer.errors import Problem
from trainer.redaction import REDACTED, looks_secret

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def name_rules(config: Config) -> Iterator[Problem]:
    """Yield what is wrong with the name of the run, which becomes a folder."""
    if not _NAME.fullmatch(config.run.name):
        yield Problem(
            what="is not a folder name",
            where="run.name",
            got=config.run.name,
            allowed="letters, digits, '.', '_' and '-', not starting with a sign",
            do="rename it; run.root and run.dir take paths",
        )


def secret_rules(config: Config) -> Iterator[Problem]:
    """Yield every secret: config is copied into run folders. Compose knows the file, a plan made by hand does not."""
    sections: dict[str, dict[str, object]] = asdict(config)
    for section, values in sections.items():
        for name, value in values.items():
            if looks_secret(str(value)):
                yield Problem(
                    what="looks like a secret",
                    where=f"{section}.{name}",
                    got=REDACTED,
                    allowed="no secrets in the config: it is written into the run folder",
                    do="set it as an environment variable (HF_TOKEN, ...)",
                )
