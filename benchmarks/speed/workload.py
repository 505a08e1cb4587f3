"""What both sides of the benchmark work on: models, rows and replies, written once to a folder.

    model/         a causal LM as transformers saves it
    scorer/        the same with a scalar head, as our reward models are saved
    scorer-hf/     the same head, as AutoModelForSequenceClassification is saved
    store/         our store with the model, the scorer and the data sets as artifacts
    workload.json  rows in the order in which ours takes them, digests, sizes

Rows are random token ids: the time does not depend on what they mean. Their lengths are uniform
between a tenth of the limit and the limit, as mixed as real data; the tiny model ends its replies
with the same spread, because its end-of-turn token is made likelier (see `make_talkative`).
"""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.speed.flops import shape_of

END, PAD = 0, 1  # ids of the tiny model's special tokens


@dataclass(frozen=True)
class Sizes:
    """What is trained on. Lengths in tokens."""

    model: str
    precision: str
    batch: int  # sequences of an SFT step, pairs of a reward step are half of it
    micro: int  # sequences in one pass of the peer; ours takes as many tokens
    length: int
    steps: int  # measured
    prompts: int  # of a rollout
    prompt_length: int
    reply_length: int
    group: int  # GRPO's replies to a prompt; it has prompts / group prompts
    rollouts: int  # measured
    vocabulary: int = 8192  # of the tiny model
    shortest: float = 0.1  # shortest row, as a share of the limit
    tied: bool = False  # the tiny model's vocabulary head is its embedding
    warm_up: int = 2
    """Steps, and rollouts, before the measured ones. The first update makes the optimizer's states,
    and in the step behind it the process still grows."""

    @property
    def all_steps(self) -> int:
        return self.warm_up + self.steps

    @property
    def all_rollouts(self) -> int:
        return self.warm_up + self.rollouts

    def measured(self, rows: list[dict[str, Any]], batch: int) -> list[dict[str, Any]]:
        """Those of the measured steps, of all rows in the order in which steps take them."""
        return rows[self.warm_up * batch :]


SIZES = {
    "tiny": Sizes("tiny", "fp32", 32, 8, 256, 4, 32, 64, 64, 4, 3),
    "smollm2": Sizes("smollm2", "fp32", 16, 8, 256, 4, 16, 48, 24, 4, 1),
    # every row as long as the limit: nothing is padded on either side
    "smollm2-256": Sizes("smollm2", "fp32", 8, 4, 256, 3, 4, 48, 24, 4, 1, shortest=1.0),
    "smollm2-256-bf16": Sizes("smollm2", "bf16", 8, 4, 256, 3, 4, 48, 24, 4, 1, shortest=1.0),
    # an epoch of four steps, for the growth with the samples
    "tiny-samples": Sizes("tiny", "fp32", 8, 8, 256, 2, 4, 64, 64, 4, 1),
    # tied as gpt2's and bloom's are
    "tiny-50k": Sizes("tiny", "fp32", 32, 8, 256, 1, 4, 64, 64, 4, 1, 50_000, tied=True),
    "tiny-250k": Sizes("tiny", "fp32", 32, 8, 256, 1, 4, 64, 64, 4, 1, 250_000, tied=True),
}
EPOCHS = 2  # of PPO over a rollout
TOP = 4  # the row `ppo-top` trains a quarter of the layers, the upper ones, on both sides
SEED = 0
LEARNING_RATE = 1e-4
ROLLOUT_RATE = 1e-6  # so small that the spread of the replies' lengths stays as it is


PPO = ("ppo", "ppo-top")


def rate(row: str, given: bool) -> float:
    """Learning rate of a row. GRPO's first loss is 0; given replies, its updates are to show.

    PPO's second pass would show them too, but there the peer does not clip the gradient.
    """
    return ROLLOUT_RATE if row in PPO or (row == "grpo" and not given) else LEARNING_RATE


def make(name: str, folder: Path, source: Path | None = None) -> None:
    """Write the workload of a size; a folder that holds it already is left as it is.

    Args:
        source: folder of SmolLM2-135M, where it is the model.
    """
    sizes, done = SIZES[name], folder / "workload.json"
    if done.exists() and json.loads(done.read_text())["sizes"] == asdict(sizes):
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    if sizes.model == "tiny":
        write_tiny(folder / "model", sizes.vocabulary, sizes.tied)
    else:
        assert source is not None
        write_bench_copy(source, folder / "model")
    write_scorers(folder)
    values = write_data(folder, sizes)
    values["shape"] = shape_of(folder / "model")
    done.write_text(json.dumps({"sizes": asdict(sizes), **values}))


def load(folder: Path) -> dict[str, Any]:
    """What `make` wrote."""
    values = json.loads((folder / "workload.json").read_text())
    return {**values, "sizes": Sizes(**values["sizes"])}


# -------------------------------------------------------------------------------------- models


def smollm2(folder: Path) -> Path:
    """SmolLM2-135M out of its PyPI package, imported as a pipeline does it; its folder."""
    from rlhf_core.jobs import ImportModelJob
    from rlhf_core.runtime.context import StageContext
    from rlhf_core.stages.import_model import run
    from rlhf_core.store import open_store

    store = open_store(f"file://{folder / 'store'}")
    job = ImportModelJob(source="builtin:smollm2-135m-instruct", chat_template="chatml")
    found = store.stage_result(job.key())
    if found is None:
        (folder / "work").mkdir(parents=True, exist_ok=True)
        found = run(job, StageContext(store=store, key=job.key(), folder=folder / "work"))
    assert found is not None
    return store.fetch(found.digest)


def write_tiny(folder: Path, vocabulary: int, tied: bool) -> None:
    """A random llama of 6.3 M parameters and its vocabulary of made-up words (8,192: 10.5 M)."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = {"<end>": END, "<pad>": PAD} | {f"w{i}": i for i in range(2, vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w2"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<end>", pad_token="<pad>", unk_token="w2"
    )
    torch.manual_seed(SEED)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=256,
            intermediate_size=688,
            num_hidden_layers=8,
            num_attention_heads=8,
            num_key_value_heads=4,
            max_position_embeddings=2048,
            eos_token_id=END,
            pad_token_id=PAD,
            bos_token_id=None,
            tie_word_embeddings=tied,
        )
    )
    if not tied:
        make_talkative(model)
    model.save_pretrained(folder)
    fast.save_pretrained(folder)
    (folder / "generation_config.json").write_text(
        json.dumps({"eos_token_id": END, "pad_token_id": PAD, "do_sample": True})
    )


def make_talkative(model: Any, end_probability: float = 0.03) -> None:
    """Let every position end the reply with about this probability.

    All embeddings share a direction, which the residual stream carries to the head; there the
    end-of-turn token's row points along it.
    """
    import torch

    with torch.no_grad():
        shared = torch.randn(model.config.hidden_size)
        shared *= 0.1 / shared.square().mean().sqrt()
        model.get_input_embeddings().weight.add_(shared)
        ids = torch.randint(2, model.config.vocab_size, (8, 32))
        hidden = model.model(input_ids=ids)[0].reshape(-1, model.config.hidden_size)
        along = shared / shared.norm()
        logits = model.lm_head(hidden)
        others = logits.logsumexp(dim=1).mean()
        wanted = others + torch.log(torch.tensor(end_probability / (1 - end_probability)))
        model.lm_head.weight[END] = along * wanted / (hidden @ along).mean()


def write_bench_copy(source: Path, folder: Path) -> None:
    """SmolLM2 in fp32, with a padding token of its own: the peer tells padding by the token."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.pad_token = "<|endoftext|>"
    model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_scorers(folder: Path) -> None:
    """One random scalar head on the model, in both sides' formats."""
    import torch
    from transformers import AutoModelForSequenceClassification

    from rlhf_core.models.loading import new_scalar_model
    from rlhf_core.models.saving import save_scalar_model

    model = new_scalar_model(folder / "model", SEED)
    (folder / "scorer").mkdir()
    theirs = AutoModelForSequenceClassification.from_pretrained(
        folder / "model", num_labels=1, dtype=torch.float32
    )
    with torch.no_grad():
        theirs.score.weight.copy_(model.head.weight)
    theirs.save_pretrained(folder / "scorer-hf")
    save_scalar_model(model, folder / "scorer", folder / "model")


# ---------------------------------------------------------------------------------------- data


def write_data(folder: Path, sizes: Sizes) -> dict[str, Any]:
    """Rows, replies and artifacts; returns what goes into workload.json."""
    from transformers import AutoTokenizer

    from rlhf_core.store import open_store
    from rlhf_core.training.batching import batch_rows

    chance = random.Random(SEED)
    vocabulary = len(AutoTokenizer.from_pretrained(folder / "model"))
    store = open_store(f"file://{folder / 'store'}")
    digests = {
        "model": store.publish(folder / "model", kind="model").digest,
        "scorer": store.publish(folder / "scorer", kind="reward_model").digest,
    }

    def some(limit: int) -> list[int]:
        count = chance.randint(max(2, int(limit * sizes.shortest)), limit)
        return [chance.randrange(100, vocabulary) for _ in range(count)]

    def order(rows: int, batch: int, steps: int) -> list[int]:
        return [i for step in range(steps) for i in batch_rows(rows, batch, step, SEED)]

    total = sizes.batch * sizes.all_steps
    sft = []
    for _ in range(total):
        ids = some(sizes.length)
        start = max(1, len(ids) // 4)
        sft.append({"input_ids": ids, "trainable": [i >= start for i in range(len(ids))]})
    pairs = []
    for _ in range(total // 2):
        prompt = some(sizes.length // 2)
        chosen, rejected = some(sizes.length // 2), some(sizes.length // 2)
        pairs.append({"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected})
    prompts = [{"prompt_ids": some(sizes.prompt_length)} for _ in range(sizes.prompts)]
    digests["sft"] = publish(store, folder, "sft", sft)
    digests["preference"] = publish(store, folder, "preference", pairs)
    digests["prompts"] = publish(store, folder, "prompts", prompts)
    replies = [some(sizes.reply_length) for _ in range(sizes.prompts)]
    full = [[chance.randrange(100, vocabulary) for _ in range(sizes.reply_length)] for _ in replies]
    return {
        "digests": digests,
        "sft": [sft[i] for i in order(total, sizes.batch, sizes.all_steps)],
        "pairs": [pairs[i] for i in order(total // 2, sizes.batch // 2, sizes.all_steps)],
        "prompts": [p["prompt_ids"] for p in prompts],
        "replies": replies,
        "full_replies": full,
    }


def publish(store: Any, folder: Path, purpose: Any, rows: list[dict[str, Any]]) -> str:
    """An artifact of kind dataset with these rows to train on; nothing is held out."""
    import pyarrow as pa

    from rlhf_core.data.dataset.card import DataCard, SplitCard
    from rlhf_core.data.dataset.schema import schema

    kind = schema(purpose)
    empty = {"prompt": "", "chosen": "", "rejected": "", "reference": None}
    if purpose == "prompts":
        empty["prompt"] = json.dumps([{"role": "user", "content": ""}])
    blank = {name: empty.get(name) for name in kind.names}
    whole = [{**blank, **row, "row": i} for i, row in enumerate(rows)]
    target = folder / f"data-{purpose}"
    target.mkdir()
    name = "train-00000.arrow"
    with pa.ipc.new_file(str(target / name), kind) as file:
        file.write_table(pa.Table.from_pylist(whole, schema=kind))
    files = [{"name": name, "rows": len(rows)}]
    sides = {"train": SplitCard(rows=len(rows)), "heldout": SplitCard()}
    card = DataCard(purpose, "benchmark", read=len(rows), kept=len(rows), splits=sides, files=files)
    card.save(target)
    return store.publish(target, kind="dataset").digest
