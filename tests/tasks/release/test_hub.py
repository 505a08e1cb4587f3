"""Pushing to a repository, with huggingface_hub's client and a stand-in of the hub."""

import pytest

from rlhf_core.errors import ConfigError, ModelError, StoreUnavailable
from rlhf_core.system.ports import free_ports
from tasks.release.hub import check_access, parse_target, push
from tests.tasks.release.hub_server import Repository, running

REPO = "me/bot"
CARD = b"---\nlicense: mit\n---\n# bot\n"


@pytest.fixture
def hub(monkeypatch):
    with running(monkeypatch) as hub:
        yield hub


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "README.md").write_bytes(CARD)
    (tmp_path / "config.json").write_bytes(b"{}")
    (tmp_path / "model.safetensors").write_bytes(b"weights" * 100)
    return tmp_path


def pushed(folder, **more):
    check_access(REPO, more.get("private", False))
    return push(folder, REPO, "first", **{"private": False, "branch": None, **more})


def test_push_is_one_commit_and_a_second_one_uploads_nothing(hub, folder):
    done = pushed(folder)
    repository = hub.repositories[REPO]
    assert repository.head() == {p.name: p.read_bytes() for p in folder.iterdir()}
    assert repository.messages == ["first"] and len(repository.branches["main"]) == 2
    assert (done.url, done.commit) == (f"{hub.url}/{REPO}", repository.sha("main"))
    assert done.new and not done.private and hub.uploads() == 1

    again = pushed(folder)
    assert (again.new, again.commit, hub.uploads()) == (False, done.commit, 1)
    (folder / "README.md").write_bytes(CARD + b"more")
    assert pushed(folder).new and hub.uploads() == 1


def test_files_of_another_layout_go_and_those_of_others_stay(hub, folder):
    hub.repositories[REPO] = Repository(private=False)
    old = {"model-00001-of-00002.safetensors": b"1", "model.safetensors.index.json": b"{}",
           "adapter_config.json": b"{}", "photo.png": b"p", "onnx/config.json": b"o"}  # fmt: skip
    hub.repositories[REPO].branches["main"].append(old)
    pushed(folder)
    assert set(hub.repositories[REPO].head()) == {
        "README.md", "config.json", "model.safetensors", "photo.png", "onnx/config.json",
    }  # fmt: skip


def test_branch_is_made_and_the_default_one_left_alone(hub, folder):
    pushed(folder, branch="v2", private=True)
    repository = hub.repositories[REPO]
    assert "config.json" in repository.head("v2") and repository.head() == {}
    assert repository.private and pushed(folder, branch="v2", private=True).private


@pytest.mark.parametrize(
    ("target", "text"),
    [
        ("me/bot", "'me/bot' names no place to push to; expected hub:OWNER/NAME"),
        ("hub:bot", "does not name one owner and one name.*`hf auth whoami`"),
        ("hub:datasets/me/bot", "is a repository for datasets; a model needs one for models"),
        ("hub:me/b?t", "is no repository of the hub"),
        ("hub:me/", "is no repository of the hub"),
    ],
)
def test_target_that_is_none_says_what_to_write(target, text):
    with pytest.raises(ConfigError, match=text):
        parse_target(target)


def test_target_is_a_repository():
    assert parse_target("hub:me/bot") == REPO


def test_public_repository_is_not_taken_for_a_private_one(hub, folder):
    hub.repositories[REPO] = Repository(private=False)
    with pytest.raises(ConfigError, match="exists and is public, but --private was given"):
        pushed(folder, private=True)
    assert hub.repositories[REPO].head() == {}


def test_each_refusal_has_its_advice_and_no_token(hub, folder, monkeypatch):
    def refused(kind, text):
        with pytest.raises(kind, match=text) as caught:
            pushed(folder)
        assert "hf_" not in str(caught.value)

    (folder / "README.md").write_text("---\nlicense: my-own\n---\n")
    refused(ModelError, r'takes no such files: Invalid metadata in README.md.*"license" must be')
    (folder / "README.md").write_bytes(CARD)
    monkeypatch.setenv("HF_TOKEN", "hf_wrong_and_long_enough")
    refused(ConfigError, r"does not accept the token \(401: Invalid.*hf auth login")
    monkeypatch.setenv("HF_TOKEN", "hf_read")
    refused(ConfigError, r"may not write to me/bot \(403: you don't have the rights")
    monkeypatch.setenv("HF_TOKEN", "hf_good")
    hub.broken = "POST /api/models/me/bot/commit"
    refused(StoreUnavailable, r"cannot take me/bot now \(500: out of order\); try again")
    hub.broken = "GET "
    refused(StoreUnavailable, "500")


def test_without_token_or_network_nothing_is_tried(hub, folder, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match="HF_HUB_OFFLINE is set"):
        pushed(folder)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(folder / "no-token"))
    with pytest.raises(ConfigError, match="There is no token of the hub at http://127"):
        pushed(folder)
    monkeypatch.setenv("HF_TOKEN", "hf_good")
    away = f"http://127.0.0.1:{free_ports(1)[0]}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", away)
    with pytest.raises(StoreUnavailable, match="hub cannot be reached"):
        pushed(folder)
    assert hub.requests == []
