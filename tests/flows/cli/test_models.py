"""The commands `rlhf models ...`, on a store made by hand."""

import json

import pytest
import yaml
from typer.testing import CliRunner

from flows.cli.main import app
from rlhf_core.errors import ArtifactNotFound, ConfigError
from rlhf_core.store import registry


@pytest.fixture
def command(store):
    """Runs a command here; returns what it prints."""

    def run(*arguments):
        done = CliRunner().invoke(app, ["models", *arguments])
        if done.exception is not None:
            raise done.exception
        return done.stdout

    return run


def made(store, text, *parents, kind="model", **metadata):
    return store.publish_derived(
        kind=kind, files={"config.json": text.encode()}, metadata=metadata,
        parents=[parent.digest for parent in parents],
    )  # fmt: skip


def version(store, sft, kl_coef, rate, policy_name="policy", **more):
    """A published model on one SFT model, as a run leaves it."""
    job = {"algorithm": "ppo", "kl_coef": kl_coef, "seed": 0, "model": sft.digest,
           "lora": {"rank": 8, **more}, "resources": {"ranks": int(rate * 10)}}  # fmt: skip
    policy = made(store, f"policy {kl_coef}", sft, job=job)
    metrics = {
        "models": {policy_name: {"kl_mean": 3.0, "length_mean": 20.0}},
        "win_rate": {"gold": {"rate": rate, "n": 64}},
        "reward_model": {"accuracy": 0.75},
    }
    evaluation = made(
        store, f"numbers {rate}", policy, kind="evaluation", metrics=metrics,
        job={"algorithm": "evaluate", "judge": "vader"},
    )  # fmt: skip
    return made(
        store, f"model {kl_coef}", policy, evaluation, kind="published",
        name="chat", policy=policy.digest, evaluation=evaluation.digest,
    )  # fmt: skip


@pytest.fixture
def two(store):
    sft = made(store, "sft", job={"algorithm": "sft", "learning_rate": 1e-5})
    first = version(store, sft, 0.05, 0.625, "ppo")  # as evaluations once called it
    second = version(store, sft, 0.1, 0.5, alpha=4.0)
    registry.promote(store, "chat", first.digest, run="run-1")
    registry.add_candidate(store, "chat", second.digest, run="run-2", reason="win rate is 0.5")
    return first, second


def test_list_shows_the_others_beside_a_model_that_cannot_be_read(store, two):
    registry.promote(store, "other", two[0].digest)
    store._backend.write("models/other/log/00000001.json", b"")
    done = CliRunner().invoke(app, ["models", "list"])
    assert done.exit_code == 1 and done.stdout.count("chat ") == 2
    assert "'other' is not known" in done.stderr and "artifacts repair" in done.stderr


def test_list_has_states_and_numbers(command, store, two):
    lines = command("list").splitlines()
    assert lines[0].split() == ["NAME", "VERSION", "STATE", "DIGEST", "SINCE", "(UTC)", "RUN",
                                "METRICS", "REASON"]  # fmt: skip
    first, second, empty, advice = lines[1:]
    assert (empty, advice.partition(": ")[2]) == ("", "rlhf models promote NAME VERSION")
    assert first.split()[:4] == ["chat", "1", "champion", two[0].digest[:12]]
    assert "run-1  win (gold) 0.625, KL 3, length 20, accuracy 0.75" in first
    assert second.split()[:4] == ["chat", "2", "candidate", two[1].digest[:12]]
    assert "win (gold) 0.5" in second and second.endswith("win rate is 0.5")
    store.delete(two[1].digest)
    assert "not in the store" in command("list").splitlines()[2]


def test_list_as_json_has_a_line_for_each_version(command, two):
    lines = [json.loads(line) for line in command("list", "chat", "--json").splitlines()]
    assert [(x["version"], x["digest"], x["state"]) for x in lines] == [
        (1, two[0].digest, "champion"), (2, two[1].digest, "candidate"),
    ]  # fmt: skip
    assert lines[0]["metrics"] == {
        "win rate (gold)": 0.625, "KL": 3.0, "length": 20.0, "reward accuracy": 0.75,
    }  # fmt: skip


def test_empty_store_says_how_to_make_a_model(command, store):
    assert "No models in file://" in command("list")


def test_promote_and_rollback_switch_the_champion_and_its_plain_folder(
    command, store, two, tmp_path
):
    folder = tmp_path / "home/published/chat"
    out = command("promote", "chat", two[1].digest[:8], "--reason", "shorter replies")
    assert out == f"chat: version 2 ({two[1].ref}) is the champion now.\n"
    assert registry.champion(store, "chat") == two[1].digest
    assert not folder.exists()  # nobody on this machine has published it

    folder.mkdir(parents=True)
    assert str(folder) in command("rollback", "chat")
    assert (folder / "config.json").read_text() == "model 0.05"
    assert "was the champion already" in command("promote", "chat", "1")
    history = json.loads(command("show", "chat", "--json"))["history"]
    assert [(t["action"], t["version"], t["reason"]) for t in history] == [
        ("promote", 1, ""), ("candidate", 2, "win rate is 0.5"),
        ("promote", 2, "shorter replies"), ("rollback", 1, ""),
    ]  # fmt: skip
    with pytest.raises(ArtifactNotFound, match="no previous champion"):
        command("rollback", "chat")


def test_show_has_lineage_and_history(command, two):
    text = command("show", "chat", "2")
    head, tree = text.split("\n\n", 1)
    assert yaml.safe_load(head)["state"] == "candidate"
    assert head.startswith("# To make it the champion: rlhf models promote chat 2\n")
    assert "├── model/" in tree and "win rate is 0.5" in tree


def test_archived_candidate_is_left_to_the_collector(command, store, two):
    assert command("archive", "chat", "2") == "chat: version 2 is archived.\n"
    assert registry.kept_digests(store, 0) == {two[0].digest}
    with pytest.raises(ConfigError, match="is the champion"):
        command("archive", "chat", "1")


def test_diff_names_settings_numbers_and_what_is_shared(command, two):
    found = json.loads(command("diff", "chat", "1", "2", "--json"))
    assert found["settings"] == {"ppo.kl_coef": [0.05, 0.1], "ppo.lora.alpha": [None, 4.0]}
    assert found["metrics"]["win_rate.gold.rate"] == [0.625, 0.5]
    assert "win_rate.gold.n" not in found["metrics"]  # equal
    assert len(set(found["lineage"]["sft"])) == 1 and len(set(found["lineage"]["ppo"])) == 2
    assert found["size"] == [two[0].size, two[1].size]
    text = command("diff", "chat", "1", "2")
    assert "ppo.kl_coef     0.05          0.1 (+0.05)" in text
    assert "0.5 (-0.125)" in text and "the same" in text


def test_repeated_stages_are_compared_one_by_one(store):
    from flows.cli.diff import difference

    def chain(rates):
        artifact = made(store, "base", job={"algorithm": "import_model"})
        for rate in rates:
            job = {"algorithm": "dpo", "beta": rate}
            artifact = made(store, f"{artifact.digest} {rate}", artifact, job=job)
        return made(store, str(rates), artifact, kind="published")

    settings = difference(store, chain([0.1, 0.2]), chain([0.1, 0.3]))["settings"]
    assert settings == {"dpo #2.beta": [0.2, 0.3]}


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["list", "chta"], "There is no model 'chta' in .* Did you mean chat"),
        (["promote", "chat", "3"], r"chat has no version '3'.*Versions: 1 \("),
        (["diff", "chat", "1", "12345"], "at least 6 digits"),
        (["rollback", "a/b"], "Models: chat"),
    ],
)
def test_what_is_not_there_is_named_with_what_is(command, two, arguments, text):
    with pytest.raises(ArtifactNotFound, match=text):
        command(*arguments)


def test_name_stands_for_its_champion_wherever_one_is_asked_for(store, two):
    from flows.cli.lookup import find_any, find_model

    registry.promote(store, "other", two[1].digest)
    assert find_model(store, None) == two[1]
    assert find_model(store, "chat") == find_any(store, "chat") == two[0]
    registry.add_candidate(store, "new", two[0].digest)
    with pytest.raises(ArtifactNotFound, match=r"new in .* candidates but no champion"):
        find_model(store, "new")
    registry.promote(store, "chat", two[1].digest)
    registry.rollback(store, "chat")
    assert find_model(store, None) == two[0]  # the last to become champion
