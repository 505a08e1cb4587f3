"""The stage lm_eval with the real harness, against numbers computed without it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlhf_core.data.dataset.schema import dump_messages
from rlhf_core.data.dataset.writer import write_dataset
from rlhf_core.errors import ConfigError, DataError
from rlhf_core.evaluation.harness.tasks import fingerprint
from rlhf_core.jobs import ImportModelJob, LmEvalJob, Resources
from rlhf_core.models.loading import load_causal_lm
from tests.rlhf_core.algorithms.stages import Stages
from tests.rlhf_core.evaluation.harness.own_tasks import questions, write_tasks

pytestmark = [pytest.mark.extras, pytest.mark.slow]
pytest.importorskip("lm_eval", reason="needs lm-eval; run: make test-extras")

import torch  # noqa: E402
from transformers import AutoTokenizer  # noqa: E402

TASKS = ("own_choice", "own_words", "own_text")


class Measured:
    """Two tiny models, a folder of tasks, and jobs on them by name."""

    def __init__(self, folder: Path) -> None:
        self.stages = Stages(folder)
        self.stages.env |= {"HF_HOME": str(folder / "hf"), "TQDM_DISABLE": "1"}
        jobs = [ImportModelJob(source="random:llama", seed=seed) for seed in (0, 1)]
        self.base, self.policy = (a.digest for a in self.stages.run(*jobs))
        self.own = folder / "own tasks"
        write_tasks(self.own, self._words())
        self.made: dict[str, dict[str, Any]] = {}
        self.data = self._training_data(folder / "data")

    def _training_data(self, folder: Path) -> str:
        """Two prompts: one is a question of own_choice, the other resembles none."""
        texts = [questions(12)[3]["question"].upper(), "Which stone is red?"]
        rows = [
            {"prompt_ids": [1], "prompt": dump_messages([{"role": "user", "content": text}]),
             "reference": None, "row": number}
            for number, text in enumerate(texts, 1)
        ]  # fmt: skip
        write_dataset(folder, "prompts", {"train": rows}, {"source": "test"})
        files = {path.name: path for path in folder.iterdir()}
        return self.stages.store.publish_derived(kind="dataset", files=files).digest

    def _words(self) -> list[dict[str, str]]:
        """Questions of which the base model answers every other one as the file wants it."""
        model = Plain(self.stages.store.fetch(self.base))
        asked = [f"Say {word}." for word in ("one", "two", "three", "four", "five", "six")]
        replies = [model.reply(question, 4) for question in asked]
        assert all(replies)
        return [
            {"question": q, "answer": r if i % 2 else f"not {r}"}
            for i, (q, r) in enumerate(zip(asked, replies, strict=True))
        ]

    def job(self, **settings: Any) -> LmEvalJob:
        values = {"base": self.base, "policy": self.policy, "tasks": TASKS,
                  "include_path": str(self.own), "fingerprint": fingerprint(str(self.own)),
                  "resources": Resources(micro_batch_size=4, threads=1)}  # fmt: skip
        return LmEvalJob(**(values | settings))

    def run(self, ranks: int = 1, **jobs: LmEvalJob) -> None:
        """Run jobs in the same ranks."""
        artifacts = self.stages.run(*jobs.values(), ranks=ranks)
        for name, artifact in zip(jobs, artifacts, strict=True):
            text = self.stages.store.read_bytes(artifact.digest, "lm_eval.json")
            self.made[name] = json.loads(text)
            assert artifact.metadata["metrics"] == self.made[name]


class Plain:
    """A model folder in transformers alone."""

    def __init__(self, folder: Path) -> None:
        self.model = load_causal_lm(folder)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)

    def turn(self, question: str) -> str:
        messages = [{"role": "user", "content": question}]
        return self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )

    @torch.no_grad()
    def reply(self, question: str, tokens: int) -> str:
        """The likeliest tokens one after the other, up to an end of turn."""
        ids = self.tokenizer(self.turn(question), add_special_tokens=False).input_ids
        start = len(ids)
        ends = self.model.generation_config.eos_token_id
        for _ in range(tokens):
            best = int(self.model(torch.tensor([ids])).logits[0, -1].argmax())
            ids.append(best)
            if best in (ends if isinstance(ends, list) else [ends]):
                break
        return self.tokenizer.decode(ids[start:], skip_special_tokens=True)

    @torch.no_grad()
    def logprob(self, ids: list[int], start: int) -> float:
        """Nats of the tokens from `start` on."""
        logprobs = self.model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        return sum(float(logprobs[i - 1, ids[i]]) for i in range(start, len(ids)))

    def choices(self, context: Callable[[str], str], gap: str) -> tuple[list[bool], list[bool]]:
        """Whether each question's likeliest choice is the right one; the same for nats per
        character."""
        right, right_norm = [], []
        for row in questions(12):
            before = context(row["question"])
            start = len(self.tokenizer(before, add_special_tokens=False).input_ids)
            nats = []
            for choice in row["choices"]:
                ids = self.tokenizer(before + gap + choice, add_special_tokens=False).input_ids
                nats.append(self.logprob(ids, start))
            right.append(nats.index(max(nats)) == row["answer"])
            norm = [n / len(c) for n, c in zip(nats, row["choices"], strict=True)]
            right_norm.append(norm.index(max(norm)) == row["answer"])
        return right, right_norm

    def perplexity(self, texts: list[str]) -> float:
        """Of each word, as white space parts them."""
        first = self.tokenizer.bos_token_id or self.tokenizer.eos_token_id
        ids = [self.tokenizer(text, add_special_tokens=False).input_ids for text in texts]
        nats = sum(self.logprob([first, *row], 1) for row in ids)
        return math.exp(-nats / sum(len(text.split()) for text in texts))


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Measured:
    found = Measured(tmp_path_factory.mktemp("harness"))
    found.run(
        both=found.job(prompts=found.data),
        plain=found.job(apply_chat_template=False),
        same=found.job(policy=found.base, num_fewshot=2),
    )
    return found


@pytest.fixture(scope="module")
def by_two(measured: Measured) -> dict[str, dict[str, Any]]:
    """What two ranks find: the same job under another key, and one with one example of each."""
    measured.run(
        2,
        all=measured.job(limit=12),
        first=measured.job(limit=1),
        group=measured.job(tasks=("own_group",), limit=2),
    )
    return measured.made


def values(made: dict[str, Any], model: str) -> dict[str, float]:
    rows = made["models"][model]
    return {f"{task} {key}": row["value"] for task in rows for key, row in rows[task].items()}


def test_questions_are_looked_for_in_the_training_data(measured: Measured) -> None:
    found = measured.made["both"]["contamination"]
    assert {task: row["prompts"]["near_prompts"] for task, row in found.items()} == {
        "own_choice": 1, "own_words": 0, "own_text": 0
    }  # fmt: skip
    row = found["own_choice"]["prompts"]
    assert (row["prompts"], row["rows"], row["near_rows"]) == (12, 2, 1)
    assert row["examples"][0]["prompt"] == questions(12)[3]["question"]
    assert measured.made["plain"]["contamination"] == {}


@pytest.mark.parametrize("name", ["base", "policy"])
def test_accuracy_is_that_of_the_likeliest_choice(measured: Measured, name: str) -> None:
    model = Plain(measured.stages.store.fetch(getattr(measured, name)))
    right, right_norm = model.choices(model.turn, "")
    found = measured.made["both"]["models"][name]["own_choice"]
    share = sum(right) / 12
    assert 0 < share < 1
    assert found["acc,none"]["value"] == pytest.approx(share)
    assert found["acc,none"]["stderr"] == pytest.approx(math.sqrt(share * (1 - share) / 11))
    assert found["acc_norm,none"]["value"] == pytest.approx(sum(right_norm) / 12)


def test_accuracy_without_a_chat_template_is_that_after_the_plain_question(
    measured: Measured,
) -> None:
    model = Plain(measured.stages.store.fetch(measured.policy))
    right, right_norm = model.choices(lambda question: question, " ")
    found = measured.made["plain"]["models"]["policy"]["own_choice"]
    assert found["acc,none"]["value"] == pytest.approx(sum(right) / 12)
    assert found["acc_norm,none"]["value"] == pytest.approx(sum(right_norm) / 12)


def test_written_answers_are_the_models_likeliest_tokens(measured: Measured) -> None:
    found = measured.made["both"]["models"]
    assert found["base"]["own_words"]["exact_match,none"]["value"] == 0.5
    model = Plain(measured.stages.store.fetch(measured.policy))
    rows = [json.loads(x) for x in (measured.own / "data/words.jsonl").read_text().splitlines()]
    share = sum(model.reply(row["question"], 4) == row["answer"] for row in rows) / 6
    assert found["policy"]["own_words"]["exact_match,none"]["value"] == share
    change = measured.made["both"]["change"]["own_words"]["exact_match,none"]
    assert change["value"] == share - 0.5


def test_perplexity_is_that_of_the_texts(measured: Measured) -> None:
    texts = [f"Say {word}." for word in ("one", "two", "three", "four", "five", "six")]
    for name in ("base", "policy"):
        model = Plain(measured.stages.store.fetch(getattr(measured, name)))
        found = measured.made["both"]["models"][name]["own_text"]["word_perplexity,none"]
        assert found["value"] == pytest.approx(model.perplexity(texts), rel=1e-4)


def test_a_model_beside_itself_has_changed_nothing(measured: Measured) -> None:
    made = measured.made["same"]
    assert made["models"]["base"] == made["models"]["policy"]
    for task in TASKS:
        for key, change in made["change"][task].items():
            assert (change["value"], change["stderr"] or 0.0) == (0.0, 0.0), key
    assert made["tasks"]["own_choice"]["num_fewshot"] == 2
    assert values(made, "base") != values(measured.made["both"], "base")


def test_two_ranks_find_what_one_finds(measured: Measured, by_two: dict[str, Any]) -> None:
    for name in ("base", "policy"):
        assert values(by_two["all"], name) == pytest.approx(values(by_two["both"], name), rel=1e-5)
    assert by_two["all"]["tasks"] == by_two["both"]["tasks"]
    assert by_two["all"]["shown"] == list(TASKS)


def test_a_task_may_have_fewer_examples_than_there_are_ranks(by_two: dict[str, Any]) -> None:
    first = by_two["first"]["tasks"]["own_choice"]
    assert (first["n"], first["of"]) == (1, 12)
    assert by_two["first"]["models"]["base"]["own_choice"]["acc,none"]["stderr"] is None


def test_group_without_a_number_of_its_own_is_shown_by_its_tasks(by_two: dict[str, Any]) -> None:
    assert by_two["group"]["shown"] == ["own_choice", "own_words"]
    assert by_two["group"]["tasks"]["own_words"]["n"] == 2


# --------------------------------------------------------------------------- what is refused


@pytest.fixture
def refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """The message about a job whose tasks cannot be loaded, and its kind of error."""
    import datasets

    from rlhf_core.evaluation.harness.loading import load_tasks

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    own = write_tasks(tmp_path / "own")

    def load(error: type[Exception], name: str, text: str = "") -> str:
        (own / "new.yaml").write_text(text or "task: unused\n")
        job = LmEvalJob(tasks=(name,), include_path=str(own), base="a" * 64, policy="b" * 64)
        with pytest.raises(error) as caught:
            load_tasks(job)
        return str(caught.value)

    return load


def test_unknown_task_is_named_with_those_that_are_close(refused: Callable[..., str]) -> None:
    message = refused(ConfigError, "arc_eazy")
    assert "lm_eval.tasks has 'arc_eazy'" in message
    assert "arc_easy" in message and "lm_eval ls tasks" in message


def test_data_set_that_cannot_be_downloaded_is_named(refused: Callable[..., str]) -> None:
    text = "task: far\ndataset_path: nobody-here/no-such-set\ntest_split: test\n"
    message = refused(DataError, "far", text)
    assert "the data set of far (nobody-here/no-such-set) is not in this machine's" in message
    assert "HF_ENDPOINT" in message and "include_path" in message


def test_file_that_is_not_there_is_named(refused: Callable[..., str]) -> None:
    text = "task: near\ndataset_path: json\ndataset_kwargs: {data_files: none.jsonl}\n"
    message = refused(DataError, "near", text)
    assert "near cannot be loaded (FileNotFoundError" in message and "none.jsonl" in message


def test_task_that_runs_a_models_code_is_refused(refused: Callable[..., str]) -> None:
    own = "task: runs\ninclude: choice.yaml\nunsafe_code: true\n"
    assert "runs runs code that the model wrote" in refused(ConfigError, "runs", own)


def test_task_that_fails_on_its_data_is_one_message(measured: Measured) -> None:
    from rlhf_core.evaluation.harness.stage import run
    from rlhf_core.runtime.context import StageContext

    target = "{{answer if answer < 2 else no.such}}"  # the first rows have one
    (measured.own / "wrong.yaml").write_text(
        f"task: wrong\ninclude: choice.yaml\ndoc_to_target: '{target}'\n"
    )
    job = measured.job(tasks=("wrong",))
    folder = measured.stages.write(job)
    context = StageContext(store=measured.stages.store, key=job.key(), folder=folder)
    with pytest.raises(DataError, match=r"measured the base model with wrong \(UndefinedError in "):
        run(job, context)
