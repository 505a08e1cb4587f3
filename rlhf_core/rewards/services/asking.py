"""Asks a service in the background, each question once, and keeps its answers."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import threading
from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

from rlhf_core.rewards.services.answer import Answer, Backend, Item, Question

KEPT = 100_000  # answers in memory


class AnswerFile:
    """Answers on disk, so that a stage that is resumed on this machine does not ask again.

    One line for each answer, under the hash of its question: no text of a prompt or a reply. Each
    rank writes a file of its own and reads all; a line that was cut when the rank died is ignored.

    Args:
        folder: of one service of the stage.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._path = folder / f"answers-{rank}.jsonl"

    def read(self) -> dict[str, Answer]:
        """All answers, of all ranks; the last KEPT."""
        found: OrderedDict[str, Answer] = OrderedDict()
        for path in sorted(self._folder.glob("answers-*.jsonl")):
            for line in path.read_bytes().splitlines():
                with contextlib.suppress(ValueError, TypeError, KeyError):
                    value = json.loads(line)
                    key = value.pop("key")
                    found[key] = Answer(**value)
                    if len(found) > KEPT:
                        found.popitem(last=False)
        return dict(found)

    def write(self, answers: Iterable[tuple[str, Answer]]) -> None:
        """Append, by one write that ends a line which a killed process has left open."""
        lines = [json.dumps({"key": key, **asdict(answer)}) for key, answer in answers]
        file = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            os.write(file, ("\n" + "\n".join(lines) + "\n").encode())
        finally:
            os.close(file)


class Asking:
    """The questions to one service.

    Which answer a question has does not depend on when it was asked: scores are looked up by what
    was asked, and a question that was never asked is asked then. So a question asked too early, or
    in vain, costs a request and changes nothing.

    Args:
        parallel: requests in flight at once. file: None keeps answers in memory only.
    """

    def __init__(self, backend: Backend, parallel: int, file: AnswerFile | None = None) -> None:
        self._backend, self._file = backend, file
        self._identity = json.dumps(backend.identity, sort_keys=True)
        self._client = backend.client()
        self._pool = ThreadPoolExecutor(parallel, thread_name_prefix="rlhf-reward")
        self._lock = threading.Lock()
        self._waiting: deque[tuple[str, Question]] = deque()
        self._found: OrderedDict[str, Future[Answer]] = OrderedDict()
        self._failure: BaseException | None = None
        self._closed = False
        for key, answer in (file.read() if file is not None else {}).items():
            self._found[key] = Future()
            self._found[key].set_result(answer)

    def key(self, item: Item) -> str:
        """Hash of the question about a reply."""
        return self._key(self._backend.question(item))

    def _key(self, question: Question) -> str:
        text = self._identity + json.dumps(question, sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()

    def asked(self, keys: Sequence[str]) -> list[int]:
        """Positions of those that were asked here, or are answered."""
        with self._lock:
            return [i for i, key in enumerate(keys) if key in self._found]

    def begin(self, items: Iterable[Item]) -> list[str]:
        """Ask about replies without waiting; what was asked before is not asked again.

        Returns:
            Their keys.
        """
        questions = [self._backend.question(item) for item in items]
        keys = [self._key(question) for question in questions]
        with self._lock:
            if self._closed:
                return keys
            for key, question in zip(keys, questions, strict=True):
                if key not in self._found:
                    self._found[key] = Future()
                    self._waiting.append((key, question))
                    self._pool.submit(self._work)  # finds nothing where another took it along
        return keys

    def answers(self, items: Sequence[Item]) -> list[Answer]:
        """The answers about replies, in their order; waits for them.

        Raises:
            RLHFError: the first failure of any request.
        """
        keys = self.begin(items)
        with self._lock:
            futures = [self._found[key] for key in keys]
        try:
            return [future.result() for future in futures]
        except BaseException:
            if self._failure is not None:
                raise self._failure from None  # the others are consequences
            raise
        finally:
            self._forget()

    def _work(self) -> None:
        """Send one request with what waits."""
        with self._lock:
            count = min(len(self._waiting), self._backend.batch_size)
            batch = [self._waiting.popleft() for _ in range(count)]
            failure = self._failure
        if not batch:
            return
        try:
            if failure is not None:
                raise failure
            answers = self._backend.ask(self._client, [question for _, question in batch])
            assert len(answers) == len(batch)
            named = [(key, answer) for (key, _), answer in zip(batch, answers, strict=True)]
            if self._file is not None:
                self._file.write(named)
        except BaseException as error:
            with self._lock:
                self._failure = self._failure or error
            self._backend.stop()
            for key, _ in batch:
                self._found[key].set_exception(error)
            return
        for key, answer in named:
            self._found[key].set_result(answer)

    def _forget(self) -> None:
        """Drop the oldest answers above KEPT."""
        with self._lock:
            while len(self._found) > KEPT and next(iter(self._found.values())).done():
                self._found.popitem(last=False)

    def close(self) -> None:
        """Send no further request, and wait for none."""
        with self._lock:
            self._closed = True
            self._waiting.clear()
        self._backend.stop()
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._client.close()
