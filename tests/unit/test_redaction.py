"""Secrets: what is one, what only looks like one, and that none survives ``redact``."""

import pytest

from trainer.redaction import REDACTED, environment_secrets, is_secret_name, looks_secret, redact

HF = "hf_" + "AbCdEfGhIj" * 3
NOTHING: dict[str, str] = {}


@pytest.mark.parametrize(
    "name",
    ["HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "wandb.api_key", "api-key", "apikey",
     "AWS_SECRET_ACCESS_KEY",
     "AWS_ACCESS_KEY_ID", "db_password", "PASSWORD", "client_secret", "token", "MY_CREDENTIALS", "auth_token_value"],
)  # fmt: skip
def test_secret_names(name: str) -> None:
    assert is_secret_name(name)


@pytest.mark.parametrize(
    "name",
    ["batch_tokens", "max_new_tokens", "eval.batch_tokens", "tokens_per_second", "TOKENIZERS_PARALLELISM", "tokenizer",
     "stop_token_ids", "pad_token_id", "eos_token", "num_tokens", "secretary", "keyboard", "PATH", "KEY_FILE",
     "HF_TOKEN_PATH", "PASSWORD_STORE_DIR", "image_tokens"],
)  # fmt: skip
def test_names_that_hold_no_secret(name: str) -> None:
    assert not is_secret_name(name)


SECRETS = [
    HF,
    f"token is {HF}.",
    "wandb_v1_" + "a1B2" * 8,
    "ghp_" + "a1B2" * 9,
    "github_pat_" + "a1B2" * 7,
    "sk-proj-" + "a1B2" * 7,
    "AKIA" + "ABCD1234" * 2,
    "https://user:hunter22@example.org/data.jsonl",
    "-----BEGIN RSA PRIVATE KEY-----\nMIIE\nabc\n-----END RSA PRIVATE KEY-----",
    "-----BEGIN PRIVATE KEY-----\nMIIE",
]


@pytest.mark.parametrize("text", SECRETS)
def test_shapes_of_secrets(text: str) -> None:
    assert looks_secret(text)
    cleaned = redact(text, environment=NOTHING)
    assert REDACTED in cleaned
    assert not looks_secret(cleaned)


@pytest.mark.parametrize(
    "text",
    ["Qwen/Qwen2.5-0.5B-Instruct", "hub:org/name/subset:train", "hf_internal/tiny",
     "c4c6ad0b5bd04b5d9d3bc0f9a4d7a2b1c0ffee00",
     "outputs/legal_lora/a6f502975c", "/data/sk-learn/x", "q_proj", "https://example.org:8080/a@b", "max_new_tokens=64",
     "tokens: 123456789", "loss 0.25, tokens_per_second=1234.56789", "stop_token_ids=[12345678]", "a token of thanks"],
)  # fmt: skip
def test_harmless_text_is_left_alone(text: str) -> None:
    assert not looks_secret(text)
    assert redact(text, environment=NOTHING) == text


def test_values_of_secret_variables_are_removed_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    environment = {
        "MY_TOKEN": "open-sesame",
        "OTHER_TOKEN": "open-sesame-2",
        "PIN_PASSWORD": "1234",
        "HOME": "/home/me",
    }
    assert environment_secrets(environment) == {"MY_TOKEN": "open-sesame", "OTHER_TOKEN": "open-sesame-2"}
    text = redact("a open-sesame-2 b open-sesame c 1234 /home/me", environment=environment)
    assert text == f"a {REDACTED} b {REDACTED} c 1234 /home/me"
    assert not looks_secret("x open-sesame y")
    monkeypatch.setenv("MY_TOKEN", "open-sesame")
    assert looks_secret("x open-sesame y")
    assert redact("x open-sesame y") == f"x {REDACTED} y"


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("WANDB_API_KEY=0123456789abcdef0123456789abcdef01234567", f"WANDB_API_KEY={REDACTED}"),
        ('{"api_key": "0123456789abcdef"}', f'{{"api_key": "{REDACTED}"}}'),
        ("password: correct-horse, next", f"password: {REDACTED}, next"),
        ("--hf-token=abcdefghijk rest", f"--hf-token={REDACTED} rest"),
    ],
)
def test_what_stands_after_a_secret_name_is_removed(text: str, cleaned: str) -> None:
    assert redact(text, environment=NOTHING) == cleaned
    assert redact(cleaned, environment=NOTHING) == cleaned
