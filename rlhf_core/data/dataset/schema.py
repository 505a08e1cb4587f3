"""The columns of a data set, by purpose.

    sft, pretrain  input_ids, trainable (the loss mask, same length), prompt (text of the user's
                   first turn), row
    preference     prompt_ids, chosen_ids, rejected_ids, prompt (JSON messages), chosen, rejected,
                   row; the two replies' ids end with the end-of-turn token; and, if the settings
                   name it (carried.py), margin (how much better the chosen reply is)
    unpaired       prompt_ids, completion_ids (with the end-of-turn token), prompt (JSON messages),
                   completion, label (was it good?), row
    prompts        prompt_ids, prompt (JSON messages), reference (the data set's own reply or null),
                   row; and, if the settings name them (carried.py), answer (text) and extra
                   (JSON text), both "" for a row without one

Any purpose has the column curriculum (a number that orders an epoch), if the settings name one, the
rows of a mixture have source (its name), and replies that were sampled as demonstrations have score
(what they earned). `row` is the number of the row in its source file.
Files are Arrow IPC files named train-00000.arrow, heldout-00000.arrow and so on.
"""

from __future__ import annotations

import json
from functools import cache
from typing import Any

from rlhf_core.data.rows.row import Message
from rlhf_core.errors import DataError
from rlhf_core.jobs import Purpose

SPLITS = ("train", "heldout")


@cache
def schema(purpose: Purpose, carried: tuple[str, ...] = ()) -> Any:
    """The pyarrow schema; its metadata names the purpose.

    Args:
        carried: additional columns (carried.py); they come before the last column.

    Raises:
        DataError: unknown purpose.
    """
    import pyarrow as pa

    ids = pa.list_(pa.int32())
    fields: dict[str, list[tuple[str, Any]]] = {
        "sft": [("input_ids", ids), ("trainable", pa.list_(pa.bool_())), ("prompt", pa.string())],
        "preference": [
            ("prompt_ids", ids), ("chosen_ids", ids), ("rejected_ids", ids),
            ("prompt", pa.string()), ("chosen", pa.string()), ("rejected", pa.string()),
        ],
        "unpaired": [
            ("prompt_ids", ids), ("completion_ids", ids),
            ("prompt", pa.string()), ("completion", pa.string()), ("label", pa.bool_()),
        ],
        "prompts": [("prompt_ids", ids), ("prompt", pa.string()), ("reference", pa.string())],
    }  # fmt: skip
    fields["pretrain"] = fields["sft"]
    if purpose not in fields:
        raise DataError(f"There is no purpose {purpose!r}; there are {', '.join(fields)}.")
    kinds = {"margin": pa.float64(), "curriculum": pa.float64(), "score": pa.float64()}
    added = [(name, kinds.get(name, pa.string())) for name in carried]
    columns = [*fields[purpose], *added, ("row", pa.int64())]
    return pa.schema(columns, metadata={"rlhf_purpose": purpose})


def sequence_lengths(purpose: Purpose, batch: Any) -> Any:
    """Tokens of each row's longest sequence, prompt and reply together: numpy (N,)."""
    import numpy as np
    import pyarrow.compute as pc

    def length(name: str) -> Any:
        return np.from_dlpack(pc.list_value_length(batch.column(name)))

    if purpose == "preference":
        return length("prompt_ids") + np.maximum(length("chosen_ids"), length("rejected_ids"))
    if purpose == "unpaired":
        return length("prompt_ids") + length("completion_ids")
    return length("prompt_ids" if purpose == "prompts" else "input_ids")


def trainable_tokens(purpose: Purpose, batch: Any) -> int:
    """Number of tokens that the loss covers: the loss mask, or the tokens of the replies."""
    import pyarrow.compute as pc

    if purpose == "prompts":
        return 0
    replies = {"preference": ("chosen_ids", "rejected_ids"), "unpaired": ("completion_ids",)}
    if purpose in replies:
        return sum(
            pc.sum(pc.list_value_length(batch.column(name))).as_py() or 0
            for name in replies[purpose]
        )
    return pc.sum(pc.list_flatten(batch.column("trainable"))).as_py() or 0


def dump_messages(messages: list[Message]) -> str:
    """Messages as JSON text for a `prompt` column; `json.loads` reads them."""
    return json.dumps(messages, ensure_ascii=False)
