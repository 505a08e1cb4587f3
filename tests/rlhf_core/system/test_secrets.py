"""Which values of the environment are hidden, and that no setting could hold one in the open."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest
from pydantic import BaseModel, SecretStr

from rlhf_core.jobs import EndpointJudgeSettings, Job, PipelineConfig
from rlhf_core.store.settings import StoreSettings
from rlhf_core.system.secrets import redact


@pytest.mark.parametrize(
    "name",
    ["AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "HF_TOKEN", "WANDB_API_KEY", "PREFECT_API_KEY",
     "PREFECT_SERVER_API_AUTH_STRING", "DB_PASSWORD", "OPENAI_APIKEY", "JUDGE_KEY"],
)  # fmt: skip
def test_secret_of_the_environment_is_hidden(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "marked-0123456789")
    assert redact("a marked-0123456789, b") == "a ***, b"


@pytest.mark.parametrize(
    ("name", "value"),
    [("TOKENIZERS_PARALLELISM", "disabled"), ("HF_TOKEN", "short"), ("RLHF_STORE", "file:///x/y"),
     ("AWS_SHARED_CREDENTIALS_FILE", "/home/me/.aws"), ("HF_TOKEN_PATH", "/home/me/token"),
     ("KEYBOARD", "generic-105"), ("AWS_ACCESS_KEY_ID", "AKIA-is-a-name")],
)  # fmt: skip
def test_other_values_stay(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    assert redact(f"a {value}") == f"a {value}"


def test_password_in_a_url_is_hidden() -> None:
    assert redact("at http://me:pass@host:80/x?a=b@c now") == "at http://***@host:80/x?a=b@c now"
    assert redact("at http://host:80/me@x") == "at http://host:80/me@x"


def test_password_of_a_url_is_hidden_in_a_library_s_words_too() -> None:
    text = 's3://ME:secret-word@b/x: Invalid bucket name "ME:secret-word@b", key secret-word'
    assert redact(text) == 's3://***@b/x: Invalid bucket name "***@b", key ***'


@pytest.mark.parametrize(
    ("text", "hidden"),
    [("https://me:p%40ssw0rd1@h/x: p@ssw0rd1 and p%40ssw0rd1", "https://***@h/x: *** and ***"),
     ("s3://KEY:sec/ret+of@b/x", "s3://***@b/x"), ("redis://:password1@h", "redis://***@h"),
     ("https://a-token-of-20-letters@h/x", "https://***@h/x"), ("ssh://git@h/x", "ssh://git@h/x"),
     ("GET http://h/x?a=1&X-Amz-Signature=ab12&X-Amz-Credential=AK%2F1 403",
      "GET http://h/x?a=1&X-Amz-Signature=***&X-Amz-Credential=*** 403"),
     ("{'Authorization': 'Bearer abcdefgh12'}", "{'Authorization': 'Bearer ***'}"),
     ("Authorization: Basic bWU6cGFzcw==", "Authorization: Basic ***"),
     ("token hf_abcdefghijklmnopqrstuv is", "token *** is"),
     ("key AKIAIOSFODNN7EXAMPLE", "key ***"), ("the bearer of a letter", "the bearer of a letter"),
     ("data?token_type=x and max_tokens=5", "data?token_type=x and max_tokens=5")],
)  # fmt: skip
def test_secrets_that_libraries_quote_are_hidden(text: str, hidden: str) -> None:
    assert redact(text) == hidden


def test_secret_as_a_url_writes_it_is_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "ab/cd+ef gh=12")
    text = "ab/cd+ef gh=12 ab%2Fcd%2Bef%20gh%3D12 ab%2Fcd%2Bef+gh%3D12 ab/cd%2Bef%20gh%3D12"
    assert redact(text) == "*** *** *** ***"


def test_longer_secret_goes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_TOKEN", "abcdefgh")
    monkeypatch.setenv("B_TOKEN", "abcdefgh-more")
    assert redact("x abcdefgh-more y") == "x *** y"


def fields(model: type[BaseModel], seen: set[type]) -> Iterator[tuple[str, object]]:
    if model in seen:
        return
    seen.add(model)
    for name, field in model.model_fields.items():
        yield name, field.annotation
        for part in (field.annotation, *get_args(field.annotation)):
            if isinstance(part, type) and issubclass(part, BaseModel):
                yield from fields(part, seen)


# Settings with the name of a variable or of a Kubernetes Secret, whose value is elsewhere.
NAMES = (
    "key_variable", "token_variable", "secrets", "pull_secrets", "secret_env",
    "max_new_tokens", "max_episode_tokens", "max_turn_tokens", "author",
)  # fmt: skip


def test_no_setting_holds_a_secret_in_the_open() -> None:
    seen: set[type] = set()
    for model in (PipelineConfig, StoreSettings, EndpointJudgeSettings, *get_args(Job)):
        for name, kind in fields(model, seen):
            secret = any(word in name for word in ("secret", "token", "password", "key", "auth"))
            allowed = name in NAMES or kind is SecretStr
            assert allowed or not secret, f"{model.__name__}.{name}"


def test_rank_hides_secrets_in_its_error_and_output(tmp_path: Path) -> None:
    (tmp_path / "job.json").write_text('{"algorithm": "sft", "marked-0123456789": 1}')
    done = subprocess.run(
        [sys.executable, "-m", "rlhf_core", str(tmp_path / "job.json")],
        env={"HF_TOKEN": "marked-0123456789", "PATH": "/usr/bin:/bin", "HOME": str(tmp_path),
             "PYTHONPATH": str(Path(__file__).parents[3])},
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    error = json.loads((tmp_path / "error-0.json").read_text())
    for text in (done.stdout, done.stderr, error["message"]):
        assert "marked-" not in text
    assert "***" in error["message"]
