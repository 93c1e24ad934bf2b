"""What counts as a secret, and its removal before anything is written or shown.

Secrets come from the environment only. A config that holds one is refused (it would be copied into every run folder),
and every sink (log, env.json, report, error text) passes through ``redact``.
"""

import os
import re
from collections.abc import Mapping

REDACTED = "[redacted]"

_SECRET_NAME = re.compile(
    r"(?:^|[_.\-])(?:token|tokens|api[_-]?key|access[_-]?key|secret|secrets|password|passwd|passphrase|credential|credentials)"
    r"(?:$|[_.\-](?:id|key|value)?$)",
    re.IGNORECASE,
)
_SECRET_SHAPES = (
    re.compile(r"\bhf_[A-Za-z0-9]{20,}\b"),  # Hugging Face
    re.compile(r"\bapi_org_[A-Za-z0-9]{20,}\b"),  # Hugging Face, organisations
    re.compile(r"\bwandb_v\d_[A-Za-z0-9_]{20,}\b"),  # Weights & Biases, since 2025
    re.compile(r"\b(?:ghp|gho|ghs|ghu|ghr)_[A-Za-z0-9]{36,}\b"),  # GitHub
    re.compile(r"\bgithub_pat_[A-Za-z0-9_]{22,}\b"),
    re.compile(r"\bsk-[A-Za-z0-9_\-]{20,}\b"),  # OpenAI and look-alikes
    re.compile(r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b"),  # AWS access key id
    re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----[\s\S]*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)"),
    re.compile(r"(?<=://)[^/\s:@]+:[^/\s@]+(?=@)"),  # user:password in a URL
)
# A W&B key of the older kind is 40 hex digits, which is also what a git commit looks like; only its neighbourhood
# tells them apart.
_NAMED_VALUE = re.compile(
    r"(?P<name>[A-Za-z0-9_.\-]*(?:token|api[_-]?key|access[_-]?key|secret|password|passwd)[A-Za-z0-9_]*[\"']?\s*[=:]\s*[\"']?)"
    r"(?P<value>[^\s\"',;}{)]{8,})",
    re.IGNORECASE,
)
_SHORTEST = 8


def is_secret_name(name: str) -> bool:
    """Say whether a key or variable of this name holds a secret (``HF_TOKEN``, ``wandb.api_key``, ``db_password``).

    Names of settings that merely count tokens (``batch_tokens``, ``max_new_tokens``, ``tokens_per_second``) do not.
    """
    if re.search(r"(?:batch|max|new|num|stop|pad|eos|bos|image)_?(?:\w*_)?tokens?(?:_ids?)?$", name, re.IGNORECASE):
        return False
    return _SECRET_NAME.search(name) is not None


def environment_secrets(environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return ``{variable: value}`` of the secrets in the environment; values under 8 characters would redact words."""
    variables = os.environ if environment is None else environment  # noqa: TID251
    return {
        name: value for name, value in variables.items() if is_secret_name(name) and len(value.strip()) >= _SHORTEST
    }


def looks_secret(value: str) -> bool:
    """Say whether ``value`` is, or contains, something shaped like a secret or equal to one of the environment."""
    if any(shape.search(value) for shape in _SECRET_SHAPES):
        return True
    return any(secret in value for secret in environment_secrets().values())


def redact(text: str, *, environment: Mapping[str, str] | None = None) -> str:
    """Return ``text`` with every secret replaced by ``[redacted]``.

    Removed are values of secret environment variables, strings shaped like known keys, and what stands after
    ``...token=``, ``api_key:`` and the like.
    """
    secrets = sorted(environment_secrets(environment).values(), key=len, reverse=True)
    for secret in secrets:
        text = text.replace(secret, REDACTED)
    for shape in _SECRET_SHAPES:
        text = shape.sub(REDACTED, text)
    return _NAMED_VALUE.sub(_keep_name, text)


def _keep_name(match: re.Match[str]) -> str:
    """Redact the value of ``name=value`` unless the name only counts tokens or the value is a plain number."""
    name = match["name"].strip().rstrip("\"'=: \t")
    if not is_secret_name(name) or re.fullmatch(r"[\d.]+|\[redacted\].*", match["value"]):
        return match[0]
    return match["name"] + REDACTED
