"""Low-rank adapters: their settings, and whether a model has the layers that they name."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from rlhf_core.jobs.base import PositiveInt, Settings

NOT_LINEAR = "which is no linear layer"


def shared_with(name: str) -> str:
    """Why a layer that shares its weights with the layer `name` can have no adapter."""
    return (
        f"which shares its weights with {name.rpartition('.')[2]}, so that a merged adapter would "
        "change both"
    )


class LoRA(Settings):
    """Low-rank adapters (peft). They are merged into the published weights, and kept beside
    them."""

    rank: PositiveInt = 8
    """Rank of the update matrices."""
    alpha: Annotated[float, Field(gt=0.0)] = 16.0
    """Scale: the update is multiplied by alpha / rank."""
    targets: tuple[str, ...] | None = None
    """Names of the linear layers that get an adapter, such as q_proj, or self_attn.q_proj, or the
    whole name of one layer. Also lm_head and embed_tokens, if the model does not tie them. Empty:
    all linear layers except the head."""


@dataclass(frozen=True)
class LayerNames:
    """The layers of a model.

    Attributes:
        adaptable: whole names of the layers that can have an adapter.
        others: whole name of any other layer -> why it can have none.
    """

    adaptable: Collection[str]
    others: Mapping[str, str]


def target_problems(lora: LoRA, layers: LayerNames) -> list[str]:
    """What is wrong with `targets`, one text each: "targets has X, which ...; ...".

    A target means the layers whose whole name it is, or ends with after a dot, as in peft. peft
    itself refuses only a list of which nothing matches: a misspelled name beside a right one would
    get no adapter.
    """
    found = []
    for target in lora.targets or ():
        refused = [why for name, why in layers.others.items() if _means(target, name)]
        known = any(_means(target, name) for name in layers.adaptable)
        if known and not refused:
            continue
        short = sorted({name.rpartition(".")[2] for name in layers.adaptable})
        why = refused[0] if refused else "which this model does not have"
        found.append(
            f"targets has {target!r}, {why}; valid are {', '.join(short)}, or leave targets empty "
            "for all linear layers except the head"
        )
    return found


def _means(target: str, name: str) -> bool:
    return name == target or name.endswith(f".{target}")
