"""What Weights & Biases' own variables and files say about this shell: a mode, a login, the run of an agent.

They are W&B's interface to its users (``wandb login``, ``wandb agent``, WANDB_MODE), not a second config: nothing here
chooses a tracker or a setting of the training.
"""

import configparser
import netrc
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from trainer.config.tracking import TrackerName, TrackingConfig

DEFAULT_SERVER = "https://api.wandb.ai"
OFFLINE = ("offline", "dryrun")
KEYS = ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE")
Mode = Literal["online", "offline", "disabled"]


def variables() -> Mapping[str, str]:
    """The variables of this process."""
    return os.environ  # noqa: TID251


def wandb_mode(configured: Literal["online", "offline"], environment: Mapping[str, str] | None = None) -> Mode:
    """What holds: WANDB_MODE may take data back (``offline``, ``disabled``), never send what the config keeps here."""
    said = (variables() if environment is None else environment).get("WANDB_MODE", "").strip().lower()
    if said == "disabled":
        return "disabled"
    return "offline" if said in OFFLINE else configured


def in_use(tracking: TrackingConfig, environment: Mapping[str, str] | None = None) -> list[TrackerName]:
    """The chosen trackers, without wandb where WANDB_MODE=disabled."""
    off = wandb_mode(tracking.wandb_mode, environment) == "disabled"
    return [name for name in tracking.to if not (off and name == "wandb")]


def wandb_server(environment: Mapping[str, str], home: Path) -> str:
    """The address of the server: WANDB_BASE_URL, or what ``wandb login --host`` left, or W&B's own."""
    if environment.get("WANDB_BASE_URL"):
        return environment["WANDB_BASE_URL"]
    folder = environment.get("WANDB_CONFIG_DIR")
    settings = configparser.ConfigParser(interpolation=None)
    try:
        settings.read(Path(folder or home / ".config" / "wandb") / "settings", encoding="utf-8")
    except (configparser.Error, UnicodeDecodeError):
        return DEFAULT_SERVER
    return settings.get("default", "base_url", fallback=DEFAULT_SERVER)


def has_wandb_login(environment: Mapping[str, str] | None = None, home: Path | None = None) -> bool:
    """Whether the client would find a key: in a variable, or in the netrc file where ``wandb login`` puts it."""
    environment = variables() if environment is None else environment
    if any(environment.get(name) for name in KEYS):
        return True
    home = Path.home() if home is None else home
    host = urlsplit(wandb_server(environment, home)).hostname or ""
    given = environment.get("NETRC")
    for file in [Path(given)] if given else [home / ".netrc", home / "_netrc"]:
        try:
            found = netrc.netrc(file)
        except (OSError, netrc.NetrcParseError):
            continue
        if host in found.hosts:
            return True
    return False


def agents_run(environment: Mapping[str, str] | None = None) -> str:
    """The run that a ``wandb agent`` (or whoever set WANDB_RUN_ID) wants this one to be; empty: nobody does."""
    return (variables() if environment is None else environment).get("WANDB_RUN_ID", "").strip()
