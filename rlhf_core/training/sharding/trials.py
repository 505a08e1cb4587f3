"""Answers to all trials of fast paths for a module that is sharded, found by all ranks together.

A trial runs the model, and then every rank must run it: it may not be left to the first pass that
asks. So all are answered once, layer by layer as in training, and a fast path that fails on one
rank is off on all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from rlhf_core.nn import shared_prompt, unpadded
from rlhf_core.nn.backbone import WITHOUT_MASK, BareBackbone, backbone, causal_lm
from rlhf_core.nn.fast_paths import FastPath, keep_in_step, switched_on
from rlhf_core.nn.modules import Policy, ScalarModel
from rlhf_core.nn.sharded import release, roots_of
from rlhf_core.nn.vocabulary_head import PATH as HEAD
from rlhf_core.nn.vocabulary_head import lm_head
from rlhf_core.rollout import grouped_attention, kv_cache
from rlhf_core.runtime.distributed import Group

Question = tuple[FastPath, nn.Module, Callable[[], Any]]


def answer_trials(module: nn.Module, group: Group) -> None:
    """Every rank calls, after sharding."""
    for root in roots_of(module):
        questions = _questions(root)
        for _, model, _ in questions:
            keep_in_step(model)
        if not switched_on():
            continue
        for path, model, ask in questions:
            path.forget(model)  # one rank may have asked before
            works = bool(_within(root, ask))
            if group.any(not works) and works:
                path.turn_off(model, "it failed on another rank")
        release(root)


def _within(root: nn.Module, ask: Callable[[], Any]) -> Any:
    assert isinstance(root, (Policy, ScalarModel))
    return root.within(ask)


def _questions(root: nn.Module) -> list[Question]:
    """Fast path, the model that it is asked for, and how."""
    if isinstance(root, Policy):
        lm = causal_lm(root.model)
        base = backbone(lm)
        return [
            *_of_backbone(base),
            (HEAD, lm, lambda: lm_head(root.model) is not None),
            (kv_cache.PATH, lm, lambda: kv_cache.is_used(lm)),
            (grouped_attention.PATH, lm, lambda: grouped_attention.is_used(lm)),
        ]
    if isinstance(root, ScalarModel):
        whole = root.backbone
        return [
            *_of_backbone(backbone(BareBackbone(whole))),
            (shared_prompt.PATH, whole, lambda: shared_prompt.takes_block_masks(whole)),
        ]
    return []


def _of_backbone(base: Any) -> list[Question]:
    return [
        (unpadded.PATH, base, lambda: unpadded.is_used(base)),
        (WITHOUT_MASK, base, lambda: WITHOUT_MASK.works(base)),
    ]
