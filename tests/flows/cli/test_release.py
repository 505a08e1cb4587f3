"""`rlhf models push` and `export`: from a name to a repository or a folder, as one types it."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from flows.cli.main import app
from rlhf_core.errors import ArtifactNotFound, ConfigError
from rlhf_core.store import registry
from tests.tasks.release.hub_server import running


def command(*arguments):
    done = CliRunner().invoke(app, ["models", *arguments])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.output


@pytest.fixture
def versions(store):
    """Two published models; the first is champion."""
    made = [
        store.publish_derived(
            kind="published", metadata={"name": "chat", "job": {"algorithm": "sft"}},
            files={"config.json": b"{}", "model.safetensors": text, "README.md": b"# chat"},
        )
        for text in (b"one", b"two")
    ]  # fmt: skip
    registry.promote(store, "chat", made[0].digest)
    registry.add_candidate(store, "chat", made[1].digest, reason="worse")
    return made


def test_push_takes_the_champion_or_a_version_and_says_where_it_is(versions, monkeypatch):
    with running(monkeypatch) as hub:
        out = command("push", "chat", "hub:me/chat", "--private")
        repository = hub.repositories["me/chat"]
        assert f"{versions[0].ref}: 3 files, " in out
        assert f"{hub.url}/me/chat (private)\ncommit {repository.sha('main')}\n" in out
        assert repository.head()["model.safetensors"] == b"one"
        assert repository.messages == [f"chat ({versions[0].ref})"]
        assert "Nothing is new since commit" in command("push", "chat", "hub:me/chat")
        arguments = ["--version", "2", "--revision", "next", "-m", "shorter replies"]
        command("push", "chat", "hub:me/chat", *arguments)
        assert repository.head("next")["model.safetensors"] == b"two"
        assert b"> **Not promoted by its run.** worse" in repository.head("next")["README.md"]
        assert repository.messages[-1] == "shorter replies"
        with pytest.raises(ArtifactNotFound, match="Did you mean chat"):
            command("push", "chta", "hub:me/chat")


def test_export_writes_a_new_folder_and_names_llama_cpp_for_gguf(versions, tmp_path):
    folder = tmp_path / "out"
    assert f"{versions[0].ref} -> {folder} (3 files" in command("export", "chat", str(folder))
    assert (folder / "model.safetensors").read_bytes() == b"one"
    with pytest.raises(ConfigError, match="name a new or empty folder"):
        command("export", "chat", str(folder), "--version", "2")
    with pytest.raises(ConfigError, match=r"llama\.cpp: python convert_hf_to_gguf\.py FOLDER"):
        command("export", "chat", str(tmp_path / "new"), "--format", "gguf")
    assert "the format is safetensors" in command("export", "chat", "x", "--format", "onnx")
    assert not (tmp_path / "new").exists()
