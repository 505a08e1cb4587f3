"""The objectives that are compared: our settings, and TRL's that mean the same."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPLY_LENGTH = 12  # longest reply in tokens
GROUP = 4  # replies to a prompt

# TRL 1.16 multiplies the KL by the ratio unless told otherwise.
PLAIN = {"loss_type": "grpo", "beta": 0.04, "use_bias_correction_kl": False}
NO_KL = {"beta": 0.0}


@dataclass(frozen=True)
class Case:
    """One objective, on both sides."""

    name: str
    algorithm: str
    ours: dict[str, Any]
    theirs: dict[str, Any]


CASES = (
    Case("GRPO", "grpo", {}, PLAIN),
    Case("DAPO: clip-higher, token-mean", "grpo",
         {"clip_range_high": 0.28, "average": "token-mean", "kl_coef": 0.0},
         {"loss_type": "dapo", "epsilon_high": 0.28, **NO_KL}),
    Case("Dr. GRPO", "grpo",
         {"scale_rewards": False, "average": "seq-mean-token-sum-norm", "kl_coef": 0.0},
         {"loss_type": "dr_grpo", "scale_rewards": "none", **NO_KL}),
    Case("GSPO", "grpo",
         {"objective": "gspo", "clip_range": 0.04, "clip_range_high": 0.05, "kl_coef": 0.0},
         {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 0.04,
          "epsilon_high": 0.05, **NO_KL}),
    Case("GSPO, summed over tokens (LUSPO)", "grpo",
         {"objective": "gspo", "clip_range": 0.04, "clip_range_high": 0.05, "kl_coef": 0.0,
          "average": "seq-mean-token-sum"},
         {"loss_type": "luspo", "importance_sampling_level": "sequence", "epsilon": 0.04,
          "epsilon_high": 0.05, **NO_KL}),
    Case("CISPO", "grpo",
         {"objective": "cispo", "clip_range_high": 0.3, "average": "token-mean", "kl_coef": 0.0},
         {"loss_type": "cispo", "epsilon_high": 1.3, **NO_KL}),
    Case("dual clip", "grpo", {"dual_clip": 1.4}, {**PLAIN, "delta": 1.4}),
    Case("KL times the ratio", "grpo", {"kl_correction": True, "kl_coef": 0.5},
         {**PLAIN, "beta": 0.5, "use_bias_correction_kl": True}),
    Case("RLOO", "rloo", {"clip_range_high": 0.28, "kl_coef": 0.0},
         {"epsilon_high": 0.28, **NO_KL}),
)  # fmt: skip


def load(folder: Path) -> dict[str, Any]:
    """The batch that `__main__` wrote: prompts, replies, scores, and log-probabilities of each
    reply's tokens."""
    return json.loads((folder / "batch.json").read_text())  # type: ignore[no-any-return]
