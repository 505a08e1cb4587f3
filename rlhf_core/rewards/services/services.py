"""All rewards of a configuration that services compute."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from rlhf_core.jobs.reward_services import SERVICES, CodeReward, HttpReward, JudgeReward
from rlhf_core.jobs.rewards import Reward, reward_names
from rlhf_core.rewards.services.answer import Answer, Backend, Item
from rlhf_core.rewards.services.asking import AnswerFile, Asking
from rlhf_core.rewards.services.code import CodeScorer
from rlhf_core.rewards.services.http import HttpScorer
from rlhf_core.rewards.services.judge import JudgeScorer


class Services:
    """The services among the setting `rewards`.

    Args:
        rewards: in the order of the configuration.
        folder: where answers are kept for a resumed stage; None: in memory only.
        rank, ranks: that ask together; they share `parallel`.
        first_asks: rank 0 asks for all of them, and has `parallel` for itself.

    Attributes:
        first_asks: see above.
        names: one per service: its type, with -2, -3 for further ones of the type.
        weights: one per service.
        waited: seconds that `answers` waited, since the start.

    Raises:
        ConfigError: the environment variable with a key is not set.
    """

    def __init__(
        self,
        rewards: Sequence[Reward],
        folder: Path | None = None,
        rank: int = 0,
        ranks: int = 1,
        first_asks: bool = False,
    ) -> None:
        services = [reward for reward in rewards if isinstance(reward, SERVICES)]
        self.names = reward_names(services)
        self.weights = [service.weight for service in services]
        self.waited = 0.0
        self.first_asks = first_asks
        share = 1 if first_asks and rank == 0 else ranks
        self._backends = [_backend(service) for service in services]
        self._asking = []
        for name, backend in zip(self.names, self._backends, strict=True):
            file = None if folder is None else AnswerFile(folder / name, rank)
            self._asking.append(Asking(backend, max(1, backend.parallel // share), file))

    def begin(self, items: Sequence[Item]) -> None:
        """Ask all services about replies, without waiting."""
        for asking in self._asking:
            asking.begin(items)

    def asked(self, items: Iterable[Item]) -> list[int]:
        """Positions of the replies about which all services were asked by this process."""
        listed = list(items)
        found = set(range(len(listed)))
        for asking in self._asking:
            found &= set(asking.asked([asking.key(item) for item in listed]))
        return sorted(found)

    def answers(self, items: Sequence[Item]) -> list[list[Answer]]:
        """The answers: one list per service, with one for each reply. Waits for them.

        Raises:
            DataError: a row lacks what a service needs.
            JudgeError: a service refused, or kept failing.
        """
        began = time.perf_counter()
        for asking in self._asking:
            asking.begin(items)
        found = [asking.answers(items) for asking in self._asking]
        self.waited += time.perf_counter() - began
        return found

    def check(self, answers: Sequence[Sequence[Answer]]) -> None:
        """Raise JudgeError if too many of a rollout's replies could not be judged.

        Args:
            answers: one list per service.
        """
        for backend, of_service in zip(self._backends, answers, strict=True):
            backend.check(list(of_service))

    def close(self) -> None:
        """Send no further request."""
        for asking in self._asking:
            asking.close()


def _backend(reward: HttpReward | JudgeReward | CodeReward) -> Backend:
    match reward:
        case HttpReward():
            return HttpScorer(reward)
        case JudgeReward():
            return JudgeScorer(reward)
        case CodeReward():
            return CodeScorer(reward)
