"""`rlhf artifacts repair` and `delete`, on a store made by hand."""

import json

from typer.testing import CliRunner

from flows.cli.main import app
from rlhf_core.store import registry


def command(*arguments):
    return CliRunner().invoke(app, ["artifacts", *arguments])


def made(store, text, *parents):
    return store.publish_derived(
        kind="model", files={"config.json": text.encode()}, parents=[p.digest for p in parents]
    )


def test_damage_is_listed_then_repaired_and_says_who_needs_it(store, tmp_path):
    artifact = made(store, "champion")
    registry.promote(store, "chat", artifact.digest)
    assert command("repair").stdout == "Nothing is damaged.\n"
    blob = next((tmp_path / "store" / "blobs").rglob("[0-9a-f]*[0-9a-f]" * 8))
    blob.write_bytes(b"champ")
    listed = command("repair")
    assert listed.exit_code == 1 and "it has 5 bytes instead of 8" in listed.stdout
    assert f"Cannot be used: {artifact.ref}; named by champion version 1 of chat." in listed.stdout
    assert blob.read_bytes() == b"champ"

    told = json.loads(command("repair", "--yes", "--json").stdout)
    assert told["repaired"] and [d["done"] for d in told["damage"]] == ["deleted"]
    assert told["unusable"] == {f"model/{artifact.digest}": ["champion version 1 of chat"]}
    assert not blob.exists()
    (tmp_path / "copies").mkdir()
    (tmp_path / "copies" / "any").write_bytes(b"champion")
    healed = command("repair", "--yes", "--from", str(tmp_path / "copies"))
    assert healed.exit_code == 0 and f"replaced by {tmp_path}/copies/any" in healed.stdout
    assert blob.read_bytes() == b"champion" and "Cannot be used" not in healed.stdout


def test_what_something_names_is_not_deleted(store):
    parent = made(store, "parent")
    child, other, lone = made(store, "child", parent), made(store, "other"), made(store, "lone")
    registry.promote(store, "chat", child.digest)
    registry.add_candidate(store, "chat", other.digest)
    stages = {"sft": {"digest": parent.digest, "kind": "model"}}
    ended = {"id": "run-1", "state": "completed", "stages": stages}
    store.write_record("runs/run-1.json", ended)

    def refused(artifact, *options):
        done = command("delete", artifact.digest[:12], *options)
        assert done.exit_code != 0
        return str(done.exception)

    assert "is in use: champion version 1 of chat." in refused(child, "--force")
    text = refused(parent)
    assert "run run-1 (completed)" in text and f"{child.ref}, which was made from it" in text
    assert "--force deletes it" in text
    assert "candidate version 2 of chat" in refused(other)
    store.write_record("runs/run-1.json", {**ended, "state": "running", "host": "elsewhere"})
    assert "run run-1 (running)" in refused(parent, "--force")
    store.write_record("runs/run-1.json", ended)
    assert command("delete", lone.ref).stdout.startswith(f"Deleted {lone.ref} and 0 files")
    told = json.loads(command("delete", parent.digest, "--force", "--json").stdout)
    assert told["artifact"] == f"model/{parent.digest}" and len(told["named_by"]) == 2
    assert {a.digest for a in store.list()} == {child.digest, other.digest}
