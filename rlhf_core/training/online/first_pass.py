"""What is computed once although scoring a rollout and training on it both need it."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Sequence

import torch
from torch import Tensor

from rlhf_core.nn.padding import TokenIndex
from rlhf_core.nn.shared_trunk import Trunk
from rlhf_core.runtime.distributed import Group


class FirstPass:
    """What the first forward passes over a rollout leave behind for the later ones.

    It belongs to one rollout: `score` makes it, the algorithm's loop hands it to `optimise`, and
    nothing else changes it. It saves two things, to the same bytes:

    * **The old log-probabilities of the first minibatch.** No weight has changed between scoring
      and the first update, so that update's forward pass finds the old log-probabilities. Scoring
      leaves them out (`defers`), the update hands them in (`record`), and before the optimizer
      step every rank gets them (`complete`). This saves one forward pass of the policy over the
      minibatch: one of the five passes over the replies in GRPO with one minibatch and one epoch.
      Possible where nothing needs them sooner: no KL in the reward, no critic.
    * **Hidden states of layers that models share.** With `trainable_layers`, the layers below the
      trained ones are the same in all models and never change: they run once for each micro-batch,
      and every model and every epoch goes on from there (see `nn.shared_trunk`).
    """

    def __init__(self, trunk: Trunk | None, deferred: Collection[int] = ()) -> None:
        """Nothing is computed yet.

        Args:
            trunk: the layers that the models share; None: they share none.
            deferred: indices of the replies whose old log-probabilities the first update finds.
        """
        self._trunk = trunk
        self._deferred = frozenset(deferred)
        self._logprobs: list[tuple[list[int], Tensor]] = []  # indices, (b,T)
        self._hidden: dict[tuple[int, ...], Tensor] = {}  # indices of a micro-batch -> (b,S,d)

    @property
    def unfinished(self) -> bool:
        """Whether old log-probabilities are still missing."""
        return bool(self._deferred)

    def defers(self, indices: Sequence[int]) -> bool:
        """Whether the old log-probabilities of these replies are left to the first update."""
        return self._deferred.issuperset(indices)

    def record(self, indices: list[int], logprobs: Tensor) -> None:
        """Keep the log-probabilities (b,T) that the first update found for a micro-batch."""
        self._logprobs.append((indices, logprobs.detach()))

    def complete(self, old_logprobs: Tensor, group: Group) -> Tensor:
        """Fill in what was missing from what all ranks have recorded. Every rank calls.

        Args:
            old_logprobs: (B,T) with zeros in the deferred rows.

        Returns:
            (B,T), whole, on every rank; the argument is unchanged.
        """
        whole = old_logprobs.clone()
        mine = [index for indices, _ in self._logprobs for index in indices]
        logprobs = torch.cat([x for _, x in self._logprobs]).cpu()  # (b,T), one copy for all
        for indices, rows in group.gather((mine, logprobs)):
            whole[indices] = rows
        self._deferred, self._logprobs = frozenset(), []
        return whole

    @contextlib.contextmanager
    def shared_layers(
        self,
        indices: Sequence[int],
        input_ids: Tensor,
        mask: Tensor,
        index: TokenIndex | None = None,
    ) -> Iterator[None]:
        """Within it, models go on from the end of the layers they share, if they share any.

        Args:
            indices: the micro-batch's replies; the same ones come with the same tokens.
            input_ids, mask: (b,S) of the micro-batch. index: of its rows, see `TokenIndex`.
        """
        if self._trunk is None:
            yield
            return
        key = tuple(indices)
        if key not in self._hidden:
            self._hidden[key] = self._trunk.run(input_ids, mask, index)
        with self._trunk.replaced_by(self._hidden[key]):
            yield
