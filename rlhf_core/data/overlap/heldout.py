"""Finds passages of held-out prompts in training rows.

    shared          the row and the prompt have N words in a row in common
    near-duplicate  the row's own prompt is the same but for case, white space and punctuation at
                    the ends of words, or the row has at least NEAR of the prompt's n-grams

A prompt of fewer than N words has no n-gram, and is only found whole. N-grams that are in more than
COMMON held-out prompts are a template, such as an instruction before each question. They are left
out (GPT-3 leaves out those of more than 10 training documents), and so are the n-grams of which
most words are a template's.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from rlhf_core.data.overlap.ngrams import N, grams, whole, words
from rlhf_core.data.overlap.result import NEAR, Overlap

COMMON = 10
MOST_GRAMS = 2**21  # of held-out prompts that are compared; 24 MiB
MOST_PROMPTS = 20_000
MOST_EXAMPLES = 5
SHOWN = 300  # characters of a prompt in an example


class Match(NamedTuple):
    """A training row that shares something with held-out prompts.

    Attributes:
        row: its number.
        found: prompt number -> share of its n-grams that the row has; 1 for the same words.
        hashes: `ngrams.grams` of all its words.
    """

    row: int
    found: dict[int, float]
    hashes: Any


class HeldoutPrompts:
    """The held-out prompts, added one after another; then `matches` of training rows.

    Attributes:
        texts: the prompts that are compared: different ones, the first within MOST_PROMPTS and
            MOST_GRAMS.
        left_out: number of rows that were added beyond these bounds.
    """

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.left_out = 0
        self._whole: dict[int, int] = {}
        self._grams: list[Any] = []
        self._added = 0
        self._sizes: list[int] = []  # n-grams of each prompt, without templates
        self._hashes: Any = None  # sorted, (G,)
        self._owners: Any = None  # prompt number of each, (G,)

    @classmethod
    def of(cls, texts: Iterable[str]) -> HeldoutPrompts:
        """These prompts, finished."""
        prompts = cls()
        for text in texts:
            prompts.add(text, whole(text), grams([words(text)])[0])
        prompts.finish()
        return prompts

    def add(self, text: str, own: int, hashes: Any) -> None:
        """Add a prompt. An empty one, or one that equals an earlier one, has no effect.

        Args:
            text: for examples. own: `whole` of it. hashes: `grams` of its words.
        """
        if not own or own in self._whole:
            return
        if len(self.texts) >= MOST_PROMPTS or self._added >= MOST_GRAMS:
            self.left_out += 1
            return
        self._whole[own] = len(self.texts)
        self._grams.append(hashes)
        self._added += len(hashes)
        self.texts.append(text[: 10 * SHOWN])

    def finish(self) -> None:
        """Sort the n-grams; no prompt can be added afterwards."""
        import numpy as np

        none = [np.zeros(0, np.uint64)]
        found, times = np.unique(
            np.concatenate([*none, *map(np.unique, self._grams)]), return_counts=True
        )
        common = found[times > COMMON]
        own = [np.unique(_without_template(row, common)) for row in self._grams]
        self._sizes = list(map(len, own))
        hashes = np.concatenate([*none, *own])
        order = np.argsort(hashes, kind="stable")
        self._hashes = hashes[order]
        self._owners = np.repeat(np.arange(len(own)), self._sizes)[order]
        self._grams = []
        # Of most n-grams of a row a bit says that they are not there, faster than a search.
        self._bits = np.zeros(2**22, bool)
        self._bits[_bit(self._hashes)] = True

    def matches(
        self, rows: Sequence[int], own: Sequence[int], hashes: Sequence[Any]
    ) -> tuple[int, list[Match]]:
        """How many of some training rows have words, and those that share some with the prompts.

        Args:
            rows: their numbers. own: `ngrams.whole` of each row's prompt.
            hashes: `ngrams.grams` of all its words.
        """
        compared = sum(bool(p or len(h)) for p, h in zip(own, hashes, strict=True))
        found = sorted(self._find(own, hashes).items())
        return compared, [Match(rows[i], prompts, hashes[i]) for i, prompts in found]

    def _find(self, own: Sequence[int], hashes: Sequence[Any]) -> dict[int, dict[int, float]]:
        """Place of a row -> what it shares, see `Match.found`. Rows without any are left out."""
        import numpy as np

        found: dict[int, dict[int, float]] = {}
        ends = np.cumsum([len(row) for row in hashes])
        flat = np.concatenate([np.zeros(0, np.uint64), *hashes])
        places = np.flatnonzero(self._bits[_bit(flat)])
        first = np.searchsorted(self._hashes, flat[places], "left")
        last = np.searchsorted(self._hashes, flat[places], "right")
        true = last > first
        rows = np.searchsorted(ends, places[true], "right")
        hits = set(zip(rows.tolist(), first[true].tolist(), last[true].tolist(), strict=True))
        counts = Counter(
            (row, prompt) for row, a, b in hits for prompt in self._owners[a:b].tolist()
        )
        for (row, prompt), count in counts.items():
            found.setdefault(row, {})[prompt] = count / self._sizes[prompt]
        for row, prompt_of_row in enumerate(own):
            if (same := self._whole.get(prompt_of_row)) is not None:
                found.setdefault(row, {})[same] = 1.0
        return found

    def passage(self, prompt: int, hashes: Any) -> str:
        """The words of a prompt that a row shares with it; empty if the text is too long to tell.

        Args:
            hashes: `grams` of the row's words.
        """
        import numpy as np

        own = words(self.texts[prompt])
        both = np.intersect1d(hashes, self._hashes)
        places = np.flatnonzero(np.isin(grams([own])[0], both)).tolist()
        if not places:
            return ""
        end = next((a for a, b in pairwise(places) if b > a + 1), places[-1])
        return b" ".join(own[places[0] : end + N]).decode("utf-8", "replace")


def _without_template(hashes: Any, common: Any) -> Any:
    """The n-grams of a prompt of which most words are not in one of the common n-grams."""
    import numpy as np

    if not len(common) or not len(hashes):
        return hashes
    shared = np.convolve(np.isin(hashes, common), np.ones(N, int))  # (words,)
    own = np.convolve(shared == 0, np.ones(N, int), "valid")  # (n-grams,)
    return hashes[own > N // 2]


def _bit(hashes: Any) -> Any:
    """Place of each hash in a table of 2**22 bits."""
    import numpy as np

    return (hashes >> np.uint64(42)).astype(np.int64)


class Comparison:
    """Compares training rows with held-out prompts, one after another."""

    def __init__(self, heldout: HeldoutPrompts) -> None:
        self._heldout = heldout
        self._result = Overlap(len(heldout.texts), heldout.left_out)
        self._shared: set[int] = set()
        self._near: set[int] = set()
        self._kept = 0
        self._examples: list[tuple[float, int, dict[str, Any]]] = []

    def add(self, rows: Sequence[int], own: Sequence[int], hashes: Sequence[Any]) -> None:
        """Compare rows; see `HeldoutPrompts.matches`."""
        self.merge(*self._heldout.matches(rows, own, hashes))

    def merge(self, compared: int, matches: Sequence[Match]) -> None:
        """Add the result of `HeldoutPrompts.matches`."""
        self._result.rows += compared
        for match in matches:
            found = match.found
            near = {prompt for prompt, share in found.items() if share >= NEAR}
            self._result.shared_rows += 1
            self._result.near_rows += bool(near)
            best = max(found, key=lambda prompt: (found[prompt], -prompt))
            if best not in self._shared or (best in near and best not in self._near):
                self._keep(match, best)
            self._shared |= found.keys()
            self._near |= near

    def _keep(self, match: Match, prompt: int) -> None:
        """Keep a row as an example for a prompt, if few have a larger share."""
        self._kept += 1
        share = match.found[prompt]
        rank = (share, -self._kept)
        if len(self._examples) == MOST_EXAMPLES and rank < self._examples[0][:2]:
            return
        example = {
            "row": match.row, "prompt": self._heldout.texts[prompt][:SHOWN],
            "share": round(share, 3),
            "passage": self._heldout.passage(prompt, match.hashes)[:SHOWN],
        }  # fmt: skip
        heapq.heappush(self._examples, (*rank, example))
        if len(self._examples) > MOST_EXAMPLES:
            heapq.heappop(self._examples)

    def result(self) -> Overlap:
        """The counts and examples."""
        self._result.shared_prompts = len(self._shared)
        self._result.near_prompts = len(self._near)
        self._result.examples = [e for _, _, e in sorted(self._examples, key=lambda x: x[:2])[::-1]]
        return self._result
