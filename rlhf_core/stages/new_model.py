"""Makes a model from scratch: a tokenizer trained on the user's text, weights from the seed.

Runs as one plain process. The artifact has the shape of an imported model's, so that every stage
accepts it: a Hugging Face folder with fp32 weights, a byte-level BPE tokenizer (no text is
unknown to it), ChatML as chat template, and generation settings that end at either of

    <|im_end|>       the end of a turn
    <|endoftext|>    the end of a text (eos)

`<|pad|>` pads. The same text, settings and seed give the same bytes.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING

from rlhf_core.data.dataset.split import first_prompt, is_heldout
from rlhf_core.data.fingerprint import check_unchanged
from rlhf_core.data.rows.columns import Rules
from rlhf_core.data.rows.detect import find_format
from rlhf_core.data.rows.formats import normalise
from rlhf_core.data.rows.row import SKIP_HINT, TOOLS, BadRow, message_text
from rlhf_core.data.sources.open import open_rows
from rlhf_core.errors import DataError
from rlhf_core.jobs import DataSettings, NewModelJob, NewModelSettings
from rlhf_core.jobs.pretraining import SPECIAL_TOKENS
from rlhf_core.model_files.source_check import new_model_sizes
from rlhf_core.models.random_model import initialise
from rlhf_core.runtime.context import StageContext
from rlhf_core.stages.import_model import (
    Loaded,
    describe,
    prepare_tokenizer,
    quiet,
    save,
    set_generation,
)
from rlhf_core.store import Artifact

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SOURCE = "new"


def run(job: NewModelJob, context: StageContext) -> Artifact:
    """Make the tokenizer and the weights, and publish them.

    Raises:
        DataError: the text cannot be read, has changed since, or has no row that is trained on.
    """
    check_unchanged(job.text, job.fingerprint)
    quiet()
    tokenizer = train_tokenizer(itertools.chain.from_iterable(map(texts, job.text.parts)), job)
    if len(tokenizer) < job.vocabulary:
        sources = ", ".join(part.source for part in job.text.parts)
        context.log(
            f"the text of {sources} gave {len(tokenizer):,} tokens instead of {job.vocabulary:,}"
        )
    model = initialise(job.architecture, tokenizer, new_model_sizes(job), job.seed)
    loaded = Loaded(model, tokenizer)
    ends = prepare_tokenizer(tokenizer, "chatml", SOURCE)
    set_generation(loaded, ends)
    folder = context.scratch("model")
    save(model, tokenizer, folder)
    context.log(f"made a {job.architecture} of {model.num_parameters():,} parameters; publishing")
    return context.publish(job, folder, describe(loaded, ends, f"{SOURCE}:{job.architecture}"))


def texts(settings: DataSettings) -> Iterator[str]:
    """The texts of a source in its order, without the held-out ones.

    Conversations give their messages. `max_samples`, `max_length` and `deduplicate` are ignored:
    they choose what is trained on, and a tokenizer can use all text.

    Raises:
        DataError: the source or a row cannot be used (see `on_bad_row`), or nothing is left.
    """
    rows, format = find_format(open_rows(settings), settings, "pretrain")
    rules = Rules.of(settings, "pretrain", Counter())
    read = used = 0
    for raw in rows:
        read += 1
        if raw.dropped:
            continue
        try:
            example = normalise(raw.columns(settings.renames), format, "pretrain", rules)
        except BadRow as bad:
            if settings.on_bad_row == "error":
                raise DataError(f"{raw.where()}: {bad.message}. {SKIP_HINT}") from None
            continue
        prompt = first_prompt(example.messages) if example.text is None else example.text
        if is_heldout(prompt, settings.heldout_fraction):
            continue
        used += 1
        yield from map(message_text, example.messages)
        yield from (
            json.dumps(m[TOOLS], ensure_ascii=False) for m in example.messages if TOOLS in m
        )
        yield from map(message_text, example.replies[:1])
        yield from (text for text in (example.text,) if text)
    if not used:
        raise DataError(
            f"{settings.source}: no row is left to make a tokenizer from; {read:,} were read, the "
            f"others are held out (heldout_fraction {settings.heldout_fraction:g}) or cannot be "
            "used: check source and format, lower heldout_fraction or add rows."
        )


def train_tokenizer(lines: Iterator[str], settings: NewModelSettings) -> PreTrainedTokenizerBase:
    """A byte-level BPE tokenizer (as GPT-2's) that writes any text and reads it back unchanged."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=settings.vocabulary,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(lines, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|endoftext|>",
        pad_token="<|pad|>",
        model_max_length=settings.max_length,
        clean_up_tokenization_spaces=False,
    )
