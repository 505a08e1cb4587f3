"""Documents end to end in sequences of one length, so that no position of a batch is padding.

The rows of a data set of purpose `pretrain`, in the data set's own (shuffled) order, form one
stream. A row whose first token is trained on needs a token before it: the end-of-text token with
which the row before ends, or one that is put there. Rows that bring such a token (bos, or the last
one of the piece before) are taken as they are. With E for end of text and length 5:

    rows        a b E | c E | d e f E
    stream      E a b E c E d e f E
    sequences   E a b E c      c E d e f      f E
    documents   0 0 0 1 1      0 1 1 1 1      0 0
    loss on       a b E c        E d e f        E

Consecutive sequences share a token, which the first one predicts and the second only reads. So
every trained token has its loss exactly once. The last sequence is as long as what is left.

Positions count from 0 in each document of a sequence, and attention stays within it: an E is the
last token that one document predicts and the first that the next one reads. A document that goes
on in the next sequence starts again at position 0 there.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, nn

from rlhf_core.data.dataset.reading import Rows
from rlhf_core.data.dataset.sampling import Sampling
from rlhf_core.nn.backbone import backbone_hidden
from rlhf_core.nn.padding import TokenIndex, batch_on, pad_right, to_device
from rlhf_core.nn.probe_model import probing
from rlhf_core.system.seeds import derive_seed
from rlhf_core.training.batching import Sampled, drawn_from, size_of


@dataclass(frozen=True)
class Packed:
    """A sequence of S tokens.

    Attributes:
        ids, positions: token ids and position ids, 0 at the start of each document.
        loss_mask: True where a token has a loss; never at the first.
    """

    ids: list[int]
    positions: list[int]
    loss_mask: list[bool]

    @property
    def tokens(self) -> int:
        """Tokens with a loss."""
        return sum(self.loss_mask)


class Packing:
    """The packed sequences of one side of a data set; only row lengths are held in memory.

    Args:
        rows: of purpose pretrain.
        end: id of the end-of-text token.
        length: tokens of a sequence, at least 2.
        numbers: (N,) of the rows that are packed; None: all.
    """

    def __init__(
        self, rows: Rows, end: int, length: int, numbers: np.ndarray | None = None
    ) -> None:
        self.rows, self.end, self.length = rows, end, length
        self.numbers = np.arange(len(rows)) if numbers is None else numbers
        sizes = rows.lengths("input_ids")[self.numbers]  # (N,)
        # (N,) each: the first token has a loss; the last token of the row before
        needs = rows.first_and_last("trainable")[0].astype(bool)[self.numbers]
        last = np.roll(rows.first_and_last("input_ids")[1][self.numbers], 1)
        shares = needs & (last == end)
        shares[:1] = False
        self._put = needs & ~shares  # (N,) an end of text is put before the row
        ends = np.cumsum(sizes + self._put)
        self._begins = ends - sizes - self._put  # (N,) of the row's own tokens in the stream
        self._documents = self._begins - shares  # (N,) first token that the row's document reads
        self.total = int(ends[-1]) if len(ends) else 0

    def __len__(self) -> int:
        return -(-(self.total - 1) // (self.length - 1)) if self.total > 1 else 0

    def __getitem__(self, index: int) -> Packed:
        if not 0 <= index < len(self):
            raise IndexError(f"sequence {index} of {len(self)}")
        start = index * (self.length - 1)
        stop = min(start + self.length, self.total)
        first = int(np.searchsorted(self._begins, start, "right")) - 1
        after = int(np.searchsorted(self._begins, stop, "left"))
        ids: list[int] = []
        marks: list[bool] = []
        for number in range(first, after):
            row = self.rows[int(self.numbers[number])]
            if self._put[number]:
                ids.append(self.end)
                marks.append(False)
            ids += row["input_ids"]
            marks += row["trainable"]
        skip = start - int(self._begins[first])
        stream = np.arange(start, stop)
        document = np.searchsorted(self._documents, stream, "right") - 1
        begins = np.maximum(self._documents[document], start)
        return Packed(
            ids=ids[skip : skip + stop - start],
            positions=(stream - begins).tolist(),
            loss_mask=[False, *marks[skip + 1 : skip + stop - start]],
        )

    def lengths(self) -> list[int]:
        """Tokens of each sequence."""
        if not len(self):
            return []
        rest = self.total - (len(self) - 1) * (self.length - 1)
        return [self.length] * (len(self) - 1) + [rest]


class PackedSources:
    """The packed sequences of one side of a data set, numbered through. Each source of a mixture is
    packed on its own, so that the plan of the mixture counts sequences, which are equally long.

    Args: as those of `Packing`.
    """

    def __init__(self, rows: Rows, end: int, length: int) -> None:
        self.end = end
        numbers = rows.sources or {"": None}
        self.parts = {name: Packing(rows, end, length, some) for name, some in numbers.items()}
        self._starts = np.cumsum([0, *map(len, self.parts.values())])
        self.plan = None if rows.card.mixture is None else rows.card.mixture.plan

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> Packed:
        if not 0 <= index < len(self):
            raise IndexError(f"sequence {index} of {len(self)}")
        part = int(np.searchsorted(self._starts, index, "right")) - 1
        return list(self.parts.values())[part][index - int(self._starts[part])]

    @cached_property
    def sampling(self) -> Sampling | None:
        """How an epoch is drawn from the sequences; None: all of them in random order."""
        bounds = itertools.pairwise(self._starts.tolist())
        return self.plan and self.plan.sampling([np.arange(a, b) for a, b in bounds])


def steps_per_epoch(sequences: int | Sampled, batch_size: int) -> int:
    """Optimizer steps of an epoch; the last one takes what is left."""
    return max(1, -(-size_of(drawn_from(sequences)) // batch_size))


def batch_sequences(sequences: int | Sampled, batch_size: int, step: int, seed: int) -> list[int]:
    """Numbers of the sequences of a step (from 0): a function of (seed, step) alone.

    Each epoch is a permutation of all sequences, or drawn as a mixture says, and its last batch is
    smaller where they do not divide evenly.
    """
    epoch, position = divmod(step, steps_per_epoch(sequences, batch_size))
    order = _epoch_order(drawn_from(sequences), epoch, seed)
    return order[position * batch_size : (position + 1) * batch_size].tolist()


@functools.lru_cache(maxsize=2)
def _epoch_order(drawn: int | Sampling, epoch: int, seed: int) -> np.ndarray:
    if isinstance(drawn, int):
        return np.random.default_rng(derive_seed(seed, epoch)).permutation(drawn)
    return drawn.epoch(epoch, seed)


def collate(
    sequences: Sequence[Packed], device: torch.device, *, separate: bool
) -> tuple[Tensor, Tensor | None, Tensor, TokenIndex, Tensor | None]:
    """What `Policy` takes: input_ids (B,S), mask, loss_mask (B,S) bool, index, position_ids.

    Args:
        separate: keep the documents apart: there are position ids (B,S) and no mask, and each
            padded position is a document of its own. False: a mask (B,S) and no position ids.
    """
    ids, real = pad_right([p.ids for p in sequences])
    marks, _ = pad_right([p.loss_mask for p in sequences])
    input_ids, mask, loss_mask, index = batch_on(device, ids, real, marks.bool())
    if not separate:
        return input_ids, mask, loss_mask, index, None
    positions, _ = pad_right([p.positions for p in sequences])
    return input_ids, None, loss_mask, index, to_device(positions, device)


def separates_documents(model: nn.Module) -> bool:
    """Whether a model keeps its attention within a document when position ids restart at 0.

    A trial tells: the second of two documents must come out the same, to the bit, after another
    first one. Nothing that masked attention leaves out is rounded into it. llama, qwen2, gpt2 and
    similar models do; opt and bloom (in transformers) do not.
    """
    device = next(model.parameters()).device
    positions = torch.tensor([[0, 1, 2, 0, 1, 2]], device=device)
    after = []
    with probing(model):
        for first in ([1, 2, 3], [4, 5, 6]):
            ids = torch.tensor([[*first, 7, 8, 9]], device=device)
            after.append(backbone_hidden(model, ids, None, positions)[:, 3:])
    return torch.equal(*after)
