"""What is released of a model: its files and its card, on a store made by hand."""

import json

import pytest
import yaml
from huggingface_hub import ModelCard

from rlhf_core.errors import ConfigError, ModelError
from rlhf_core.store import open_store, registry
from tasks.release.card import without_local_paths
from tasks.release.contents import make_release

ORIGIN = {"source": "org/base", "license": "Apache-2.0"}
TOKENIZER = {"tokenizer.json": b"t", "chat_template.jinja": b"{{ x }}"}
FILES = {"config.json": b"{}", "generation_config.json": b"{}", "model.safetensors": b"w",
         **TOKENIZER}  # fmt: skip


def add(store, kind, algorithm, files, *parents, job=None, **metadata):
    return store.publish_derived(
        kind=kind, files=files, parents=[parent.digest for parent in parents],
        metadata={"algorithm": algorithm, "job": {"algorithm": algorithm, **(job or {})},
                  **metadata},
    )  # fmt: skip


def imported(store, **changes):
    metadata = {**ORIGIN, **changes}
    job = {"source": metadata["source"], "fingerprint": "org/base@main"}
    return add(store, "model", "import_model", FILES, job=job, **metadata)


def adapted(store, algorithm, model, *parents):
    """A model that a stage with LoRA has trained."""
    config = {"base_model_name_or_path": f"artifact:{model.digest}", "r": 8}
    files = {
        **FILES, "metrics.jsonl": b"{}", "README.md": b"of the base",
        "nf4/adapters.safetensors": b"n", "model.safetensors": algorithm.encode(),
        "adapter/adapter_model.safetensors": b"a",
        "adapter/adapter_config.json": json.dumps(config).encode(),
    }  # fmt: skip
    return add(store, "model", algorithm, files, model, *parents, job={"model": model.digest})


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """One for all tests: each writes what no other reads."""
    return open_store(str(tmp_path_factory.mktemp("store")))


@pytest.fixture(scope="module")
def made(store):
    """Base, SFT model, published PPO model."""
    base = imported(store)
    job = {"source": "org/chats", "fingerprint": "hub:org/chats@" + "a" * 40}
    hub = add(store, "dataset", "data", {"c": b"1"}, base, job=job, purpose="sft",
              metrics={"read": 10, "kept": 8})  # fmt: skip
    job = {"source": "/home/ann/secret-project/p.jsonl", "fingerprint": "f" * 64}
    own = add(store, "dataset", "data", {"c": b"2"}, base, job=job, purpose="prompts")
    sft = adapted(store, "sft", base, hub)
    ppo = adapted(store, "ppo", sft, own)
    card = "---\nx: 1\n---\n\n# chat\n\n## Evaluation\n\n| gold | 0.5 |\n\n## Lineage\n\nearlier"
    published = store.publish_derived(
        kind="published", parents=[ppo.digest], metadata={"name": "chat", "policy": ppo.digest},
        files={**{e.path: e for e in ppo.files}, "README.md": card.encode()},
    )  # fmt: skip
    return base, sft, published


def card_of(store, release):
    return store.read_bytes(release.digest, "README.md").decode()


def test_merged_model_leaves_out_what_only_this_program_reads(store, made):
    release = make_release(store, made[2])
    assert {e.path for e in release.files} == {*FILES, "README.md"}
    assert store.read_bytes(release.digest, "model.safetensors") == b"ppo"
    assert release.parents == (made[2].digest,)
    assert make_release(store, made[2]) == release


def test_header_names_base_data_and_licence_as_the_hub_wants_them(store, made):
    data = ModelCard(card_of(store, make_release(store, made[2]))).data
    assert data.to_dict() == {
        "library_name": "transformers", "pipeline_tag": "text-generation", "license": "apache-2.0",
        "tags": ["rlhf", "sft", "ppo", "conversational"], "base_model": "org/base",
        "base_model_relation": "finetune", "datasets": ["org/chats"],
    }  # fmt: skip


def test_nothing_is_made_up_about_a_base_model_that_is_on_no_hub(store):
    base = imported(store, source="org/base-local", license=None)  # a folder of such a name
    front = yaml.safe_load(card_of(store, make_release(store, base)).split("---")[1])
    assert not {"license", "base_model", "datasets"} & front.keys()
    built_in = imported(store, source="builtin:smollm2-135m-instruct")
    front = yaml.safe_load(card_of(store, make_release(store, built_in)).split("---")[1])
    assert front["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"


def test_card_has_evaluation_lineage_and_data_but_no_folder_of_this_machine(store, made):
    card = card_of(store, make_release(store, made[2], repository="me/chat"))
    assert "Base model: `org/base`. Trained in these steps: SFT, PPO." in card
    assert 'from_pretrained("me/chat")' in card
    assert card.count("| gold | 0.5 |") == 1 and "earlier" not in card
    stages = [
        line.split(" ")[1] for line in card.split("## Lineage")[1].split("\n") if "`model/" in line
    ]
    assert stages == ["import_model", "sft", "ppo"]
    assert "| data-sft | org/chats | 8 of 10 rows |" in card
    assert "…/p.jsonl" in card and "ann" not in card and "secret" not in card


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("source: /home/ann/data/x.jsonl", "source: …/x.jsonl"),
        ("`~/models/base` and (/srv/a/b.py)", "`…/base` and (…/b.py)"),
        ("https://host/a/b s3://bucket/a/b", "https://host/a/b s3://bucket/a/b"),
        ("</details> 1/2 and/or a/b/c", "</details> 1/2 and/or a/b/c"),
    ],
)
def test_of_a_local_path_only_the_last_part_is_shown(text, shown):
    assert without_local_paths(text) == shown


def test_warnings_stand_above_everything_else(store, made):
    published = made[2]
    registry.add_candidate(store, "chat", published.digest, run="r", reason="win rate 0.4 < 0.5")
    registry.promote(store, "chat", published.digest, reason="by hand")
    store.write_record("runs/r.json", {"verdict": "worse"})
    card = card_of(store, make_release(store, published))
    assert (
        "# chat\n\n> **Not promoted by its run.** win rate 0.4 &lt; 0.5\n\n> **Verdict of its "
        in card
    )
    store.write_record("runs/r.json", {"verdict": "better"})
    assert "Verdict of its" not in card_of(store, make_release(store, published))
    assert "> **Not evaluated.** This is the result of the stage sft" in card_of(
        store, make_release(store, made[1])
    )


def test_adapter_has_peft_layout_and_a_base_that_others_find(store, made):
    release = make_release(store, made[1], "adapter")
    assert {e.path for e in release.files} == {
        "adapter_config.json", "adapter_model.safetensors", "README.md", *TOKENIZER,
    }  # fmt: skip
    config = json.loads(store.read_bytes(release.digest, "adapter_config.json"))
    assert config == {"base_model_name_or_path": "org/base", "r": 8}
    card = card_of(store, release)
    front = yaml.safe_load(card.split("---")[1])
    assert (front["library_name"], front["base_model_relation"]) == ("peft", "adapter")
    assert "from peft import AutoPeftModelForCausalLM\n" in card


def test_adapter_of_a_model_that_is_on_no_hub_needs_its_name(store, made):
    _, sft, published = made
    with pytest.raises(ModelError, match=rf"is for {sft.ref} \(sft\), which is on no hub: push"):
        make_release(store, published, "adapter")
    release = make_release(store, published, "adapter", "me/chat-sft")
    assert b"me/chat-sft" in store.read_bytes(release.digest, "adapter_config.json")
    built_in = imported(store, source="builtin:smollm2-135m-instruct")  # not the hub's weights
    with pytest.raises(ModelError, match="on no hub"):
        make_release(store, adapted(store, "dpo", built_in), "adapter")
    left = adapted(store, "kto", built_in)
    store.delete(built_in.digest)
    with pytest.raises(ModelError, match="no longer in the store"):
        make_release(store, left, "adapter")
    assert "> **Its base model is not on record**" in card_of(store, make_release(store, left))


def test_what_cannot_be_released_says_why(store, made):
    with pytest.raises(ModelError, match=r"has no adapter: .* Leave out --adapter"):
        make_release(store, made[0], "adapter")
    with pytest.raises(ModelError, match="belongs to an adapter: add --adapter"):
        make_release(store, made[0], base="a/b")
    with pytest.raises(ModelError, match=r"holds no config\.json with \.safetensors files but c"):
        make_release(store, add(store, "model", "x", {"c": b"3"}))


def test_release_is_fetched_whole_and_never_over_other_files(store, made, tmp_path):
    release = make_release(store, made[2])
    folder = tmp_path / "out"
    store.fetch(release.digest, folder)
    assert {p.name for p in folder.iterdir()} == {*FILES, "README.md"}
    (folder / "config.json").write_text("changed")
    with pytest.raises(ConfigError, match="name a new or empty folder"):
        store.fetch(release.digest, folder)
