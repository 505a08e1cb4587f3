"""Models that read each other's token ids must mean the same tokens by them."""

from __future__ import annotations

from collections.abc import Mapping

from rlhf_core.errors import ModelError


def check_same_vocabulary(
    ours: Mapping[str, int], theirs: Mapping[str, int], who: str, advice: str
) -> None:
    """Compare two vocabularies, token by token. The other may have tokens beyond ours.

    Args:
        ours: token -> id of the language model. who: the other model. advice: what to do.

    Raises:
        ModelError: a token of ours is another one there, or none.
    """
    different = [token for token, number in ours.items() if theirs.get(token) != number]
    if different:
        raise ModelError(
            f"{who} reads another vocabulary than the language model: {len(different):,} of "
            f"{len(ours):,} tokens differ, {different[0]!r} is one; {advice}"
        )
