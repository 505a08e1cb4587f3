"""The modules that are trained.

Three kinds of module are trained. Each is called as a whole, so that the gradient exchange of a
wrapper (DDP, ZeRO) sees one forward per backward:

* `Policy`       causal LM -> log-probabilities of the tokens in the loss mask
* `ScalarModel`  backbone + linear head -> one number per sequence (reward) or token (value)
* `ActorCritic`  both, for PPO

d hidden size, B sequences, S positions. Sequences are right-padded.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

from rlhf_core.nn import shared_prompt
from rlhf_core.nn.backbone import BareBackbone, backbone, backbone_hidden, causal_lm
from rlhf_core.nn.fast_paths import run
from rlhf_core.nn.padding import Batch, TokenIndex
from rlhf_core.nn.response_logprobs import response_logprobs
from rlhf_core.nn.shared_prompt import block_mask, ends_of, split_rows, takes_block_masks
from rlhf_core.nn.unpadded import ATTENTION_SHARE, is_used
from rlhf_core.system.seeds import derive_seed

T = TypeVar("T")


class Policy(nn.Module):
    """A causal LM that returns log-probabilities instead of logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        input_ids: Tensor,
        mask: Tensor | None,
        loss_mask: Tensor,
        index: TokenIndex | None = None,
        temperature: float = 1.0,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        """Log-probabilities (B,S) in nats of the tokens in the loss mask, 0 elsewhere.

        Args:
            input_ids: (B,S). mask: (B,S) bool, True at real tokens; None where rows are packed.
            loss_mask: (B,S) bool, True where a log-probability is wanted; never column 0.
            index: of the rows, if the host knows it, see `TokenIndex`.
            temperature: the logits are divided by it.
            position_ids: (B,S) of packed rows, see `backbone_hidden`.
        """
        return response_logprobs(
            self.model, input_ids, mask, position_ids, loss_mask, temperature, index=index
        )

    def within(self, function: Callable[[], T]) -> T:
        """Run a function that reads parameters, as a forward pass of this module: under FSDP they
        are whole then only."""
        return function()


class ScalarModel(nn.Module):
    """Backbone of a causal LM with a linear head to one number, normalised by mean and std."""

    def __init__(self, backbone: nn.Module, hidden_size: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(hidden_size, 1)
        self.mean, self.std = 0.0, 1.0
        self.pooling = "last"

    def within(self, function: Callable[[], T]) -> T:
        """As `Policy.within`."""
        return function()

    def reset_head(self, seed: int) -> None:
        """Head weights ~ N(0, 1/sqrt(d+1)), bias 0 ("The N+ implementation details")."""
        generator = torch.Generator().manual_seed(derive_seed(seed, 0x5EED))
        d = self.head.in_features
        with torch.no_grad():
            self.head.weight.copy_(
                torch.randn(1, d, generator=generator) * (1.0 / math.sqrt(d + 1))
            )
            self.head.bias.zero_()

    def states(self, input_ids: Tensor, mask: Tensor, index: TokenIndex | None = None) -> Tensor:
        """The head's input at every position, (B,S,d)."""
        return self._states(input_ids, mask, index)

    def _states(self, input_ids: Tensor, mask: Tensor, index: TokenIndex | None) -> Tensor:
        bare = BareBackbone(self.backbone)
        hidden = backbone_hidden(bare, input_ids, mask, index=index)  # (B,S,d)
        if self.pooling == "mean":  # of all tokens so far: each position sees only its past
            real = mask.unsqueeze(-1).to(hidden.dtype)  # (B,S,1)
            hidden = (hidden * real).cumsum(dim=1) / real.cumsum(dim=1).clamp(min=1.0)
        return hidden

    def per_token(self, input_ids: Tensor, mask: Tensor, index: TokenIndex | None = None) -> Tensor:
        """The normalised number at every position, (B,S) fp32."""
        return self._normalised(self._states(input_ids, mask, index))

    def _normalised(self, hidden: Tensor) -> Tensor:
        """The head's number for each of the hidden states (...,d), fp32."""
        raw = self.head(hidden.to(self.head.weight.dtype)).squeeze(-1).float()
        return (raw - self.mean) / self.std

    def forward(
        self,
        input_ids: Tensor,
        mask: Tensor,
        index: TokenIndex | None = None,
        segments: Tensor | None = None,
    ) -> Tensor:
        """Scores (B,) fp32: the number at each row's last real token.

        Args:
            mask: (B,S) bool; position ids where segments are given.
            index: of the rows, if the host knows it, see `TokenIndex`.
            segments: (B,S) of pairs that share a row, see `rlhf_core.nn.shared_prompt`; the
                scores are then (2B,), those of the chosen replies first.
        """
        if segments is not None:
            return run(
                [shared_prompt.PATH] if takes_block_masks(self.backbone) else [],
                self.backbone,
                lambda: self._of_pairs(input_ids, mask, segments),
                lambda: self._of_rows(*split_rows(input_ids, segments)),
            )
        return self._of_rows(input_ids, mask, index)

    def _of_rows(self, input_ids: Tensor, mask: Tensor, index: TokenIndex | None = None) -> Tensor:
        values = self._normalised(self._states(input_ids, mask, index))  # (B,S)
        return values.gather(1, last_real(mask).unsqueeze(1)).squeeze(1)

    def _of_pairs(self, input_ids: Tensor, positions: Tensor, segments: Tensor) -> Tensor:
        ends = [ends_of(segments, reply) for reply in (1, 2)]  # (B,) each
        hidden = backbone_hidden(
            BareBackbone(self.backbone), input_ids, block_mask(segments), positions
        )  # (B,S,d)
        pooled = []
        for reply, end in enumerate(ends, start=1):
            if self.pooling == "mean":
                own = ((segments == 0) | (segments == reply)).unsqueeze(-1).to(hidden.dtype)
                pooled.append((hidden * own).sum(dim=1) / own.sum(dim=1))  # (B,d)
            else:
                rows = torch.arange(len(hidden), device=hidden.device)
                pooled.append(hidden[rows, end])  # (B,d)
        return self._normalised(torch.cat(pooled))  # (2B,)


def last_real(mask: Tensor) -> Tensor:
    """Position (B,) of each row's last real token, whichever side is padded."""
    return (mask.long() * torch.arange(1, mask.shape[1] + 1, device=mask.device)).argmax(dim=1)


class ActorCritic(nn.Module):
    """Policy and critic as one module, so that one backward trains both."""

    def __init__(self, policy: Policy, critic: ScalarModel) -> None:
        super().__init__()
        self.policy = policy
        self.critic = critic

    def forward(
        self,
        input_ids: Tensor,
        mask: Tensor,
        loss_mask: Tensor,
        index: TokenIndex | None = None,
        temperature: float = 1.0,
        ptx: Batch | None = None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Log-probabilities and values of the tokens in the loss mask; log-probabilities of ptx.

        Args:
            input_ids, mask, loss_mask, index: see `Policy`.
            ptx: language-modelling rows, at temperature 1.

        Returns:
            logprobs (B,S); values (B,S), at each token of the loss mask the critic's value
            of the state before it; ptx log-probabilities or None.
        """
        logprobs = self.policy(input_ids, mask, loss_mask, index, temperature)
        states = self.critic.per_token(input_ids, mask, index)  # (B,S)
        before = torch.cat([states[:, :1], states[:, :-1]], dim=1)  # (B,S), moved one right
        values = torch.where(loss_mask, before, torch.zeros_like(before))
        return logprobs, values, None if ptx is None else self.policy(*ptx)


def padding_cost(module: nn.Module) -> float:
    """Relative cost of a padding token in a forward pass of policies and critics; real token: 1."""
    bases = [
        backbone(causal_lm(m.model if isinstance(m, Policy) else BareBackbone(m.backbone)))
        for m in module.modules()
        if isinstance(m, (Policy, ScalarModel))
    ]
    unpadded = bases and all(is_used(base) for base in bases)
    return ATTENTION_SHARE if unpadded else 1.0


class Actor(nn.Module):
    """A policy that is trained without a critic; called as `ActorCritic` is."""

    def __init__(self, policy: Policy) -> None:
        super().__init__()
        self.policy = policy

    def forward(
        self,
        input_ids: Tensor,
        mask: Tensor,
        loss_mask: Tensor,
        index: TokenIndex | None = None,
        temperature: float = 1.0,
        ptx: Batch | None = None,
    ) -> tuple[Tensor, None, Tensor | None]:
        """Log-probabilities (b,S) of the loss mask's tokens, None, and those of ptx or None."""
        logprobs = self.policy(input_ids, mask, loss_mask, index, temperature)
        return logprobs, None, None if ptx is None else self.policy(*ptx)
