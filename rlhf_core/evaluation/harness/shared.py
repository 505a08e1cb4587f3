"""A model for the harness, whose requests all ranks answer together.

The harness runs on rank 0 alone and sees one model; this class distributes its requests over the
ranks. Data sets are loaded once, metrics are computed once, and a task may have fewer examples than
there are ranks (one harness in each rank, as lm-eval does it, fails there).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from rlhf_core.data.encoding.tokenizer import load_tokenizer
from rlhf_core.evaluation.harness.shares import distribute
from rlhf_core.model_files.remote_code import is_trusted
from rlhf_core.models.loading import load_causal_lm
from rlhf_core.runtime.context import StageContext
from rlhf_core.runtime.distributed import Group
from rlhf_core.system.seeds import derive_seed

BATCHES = 32  # of each rank, between two exchanges with the others


class SharedLM(HFLM):
    """The harness's model of a Hugging Face folder; ranks other than 0 call `serve`."""

    def __init__(
        self, name: str, folder: Path, dtype: torch.dtype, group: Group, micro: int,
        context: StageContext, seed: int,
    ) -> None:  # fmt: skip
        """Load the model.

        Args:
            name: of the model, for the log. micro: requests in one pass on each rank.
            seed: of sampling, for tasks that sample.

        Raises:
            ModelError: the folder is not a model, or has no chat template or tokenizer.
        """
        model = load_causal_lm(folder, dtype).requires_grad_(False).to(group.device)
        super().__init__(
            pretrained=model,
            tokenizer=load_tokenizer(folder, is_trusted(folder)),
            backend="causal",
            batch_size=micro,
            softmax_dtype="float32",
        )
        self.name, self.group, self.context, self.seed = name, group, context, seed
        self.exchanges = 0  # between the ranks so far

    def serve(self) -> None:
        """Answer the requests that rank 0 distributes, until it calls `dismiss`."""
        while (work := self.group.broadcast(None)) is not None:
            self._answer(*work)

    def dismiss(self) -> None:
        """End `serve` on the other ranks."""
        self.group.broadcast(None)

    def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> Any:
        return self._share("loglikelihood", requests)

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = True) -> Any:
        return self._share("loglikelihood_rolling", requests)

    def generate_until(self, requests: Any, disable_tqdm: bool = True) -> Any:
        return self._share("generate_until", requests)

    def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = True, **more: Any) -> Any:
        return super()._loglikelihood_tokens(requests, disable_tqdm=True, **more)

    def _share(self, kind: str, requests: Sequence[Instance]) -> list[Any]:
        """The answers to requests of one kind, in their order. Rank 0 only."""
        arguments = [request.args for request in requests]
        answers: list[Any] = [None] * len(arguments)
        done, texts = 0, [args[0] for args in arguments]
        for shares in distribute(texts, self.group.size, self.batch_size, BATCHES):
            self.exchanges += 1
            work = [[arguments[i] for i in share] for share in shares]
            self.group.broadcast((kind, self.exchanges, work))
            for share, found in zip(shares, self._answer(kind, self.exchanges, work), strict=True):
                for i, answer in zip(share, found, strict=True):
                    answers[i] = answer
            done += sum(map(len, shares))
            self.context.log(f"{self.name}: {done:,} of {len(answers):,} {kind} requests")
        return answers

    def _answer(self, kind: str, number: int, work: list[list[tuple[Any, ...]]]) -> list[list[Any]]:
        """Every rank's answers to its share of the work, on every rank."""
        rank = self.group.rank
        torch.manual_seed(derive_seed(self.seed, number, rank))
        mine = [Instance(kind, {}, args, 0, ("", 0, 1)) for args in work[rank]]
        found = getattr(HFLM, kind)(self, mine, disable_tqdm=True) if mine else []
        return self.group.gather(found)

    def get_model_info(self) -> dict[str, Any]:
        """Empty: the harness's own version queries the hub, and the job names the model."""
        return {}
