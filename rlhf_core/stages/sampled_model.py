"""The model from which a stage samples replies without training it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from rlhf_core.data.encoding.tokenizer import load_tokenizer
from rlhf_core.model_files.remote_code import is_trusted
from rlhf_core.models.loading import load_causal_lm
from rlhf_core.rollout.replies import inference_dtype
from rlhf_core.runtime.context import StageContext
from rlhf_core.runtime.distributed import Group


def load_sampled(digest: str, context: StageContext, group: Group) -> tuple[Path, Any, nn.Module]:
    """Files, tokenizer, and the frozen causal LM on the group's device."""
    source = context.store.fetch(digest)
    model = load_causal_lm(source, inference_dtype(group.device))
    model.requires_grad_(False).to(group.device)
    return source, load_tokenizer(source, is_trusted(source)), model
