"""A reward model from elsewhere: transformers' own as the oracle, and what is refused."""

import json

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from rlhf_core.errors import ModelError
from rlhf_core.jobs import ImportModelJob, ImportRewardJob
from rlhf_core.models.loading import load_scalar_model
from rlhf_core.runtime.context import StageContext
from rlhf_core.stages import import_model, import_reward
from rlhf_core.store import open_store


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A store with a tiny llama; and a function that imports a reward model for it."""
    folder = tmp_path_factory.mktemp("import-reward")
    patch = pytest.MonkeyPatch()
    patch.setenv("RLHF_HOME", str(folder / "home"))
    store = open_store(str(folder / "store"))

    def context(key):
        where = folder / key
        where.mkdir(exist_ok=True)
        return StageContext(store=store, key=key, folder=where)

    base = import_model.run(ImportModelJob(source="random:llama"), context("base"))

    def bring(source, model=base.digest):
        return import_reward.run(
            ImportRewardJob(source=str(source), model=model), context("reward")
        )

    bring.store, bring.base, bring.folder = store, store.fetch(base.digest), folder
    yield bring
    patch.undo()


@pytest.fixture(scope="module")
def classifier(place):
    """A sequence classifier with one label, as TRL would save it; its folder."""
    torch.manual_seed(1)
    model = AutoModelForSequenceClassification.from_pretrained(place.base, num_labels=1)
    folder = place.folder / "classifier"
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(place.base).save_pretrained(folder)
    return folder


def test_classifier_scores_as_transformers_does(place, classifier):
    artifact = place(classifier)
    assert artifact.kind == "reward_model"
    ours = load_scalar_model(place.store.fetch(artifact.digest))
    theirs = AutoModelForSequenceClassification.from_pretrained(classifier)
    ids = torch.randint(5, 900, (3, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids, dtype=torch.bool)
    with torch.no_grad():
        expected = theirs(ids, attention_mask=mask.long()).logits.squeeze(1)
        assert torch.allclose(ours(ids, mask), expected, atol=1e-5)


def test_own_reward_model_comes_back_from_a_folder_and_from_the_store(place, classifier):
    artifact = place(classifier)
    again = place(f"artifact:{artifact.digest}")
    pulled = place.store.fetch(artifact.digest)
    assert {f.sha256 for f in place(pulled).files} == {f.sha256 for f in again.files}


def test_other_vocabulary_is_refused(place, classifier, tmp_path):
    for path in classifier.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    tokenizer = json.loads((tmp_path / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["A"], vocabulary["B"] = vocabulary["B"], vocabulary["A"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ModelError, match=r"2 of [\d,]+ tokens differ, '[AB]' is one"):
        place(tmp_path)


def test_language_model_is_no_reward_model(place):
    with pytest.raises(ModelError, match="has no trained score layer"):
        place(place.base)
    digest = next(a.digest for a in place.store.list() if a.kind == "model")
    with pytest.raises(ModelError, match="of kind 'model'; expected a 'reward_model'"):
        place(f"artifact:{digest}")


def test_classifier_with_two_labels_is_refused(place, tmp_path):
    model = AutoModelForSequenceClassification.from_pretrained(place.base, num_labels=2)
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(place.base).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="gives 2 labels from Linear"):
        place(tmp_path)
