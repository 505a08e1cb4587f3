"""The playground's page: what its buttons and fields do.

`layout` places the components. The page contacts no other machine: Gradio's analytics, update
checks and web fonts are switched off.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from typing import Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import gradio as gr

from rlhf_core.chat.model import Sampling
from rlhf_core.data.sources.thumbs import THUMBS, save_thumb
from rlhf_core.data.sources.votes import VOTES, Verdict, save_undecided, save_vote
from rlhf_core.errors import RLHFError
from rlhf_core.playground.agreement import Agreement
from rlhf_core.playground.catalogue import RunChoices
from rlhf_core.playground.conversation import Conversation
from rlhf_core.playground.render import COLUMNS, bubbles, shown_name
from rlhf_core.playground.replies import ReplyGenerator, error_text
from rlhf_core.playground.texts import language_of, translate

Updates = dict[Any, Any]


def merge_updates(*several: Updates) -> Updates:
    """One update per component; of several values for a property the last one counts."""
    result: Updates = {}
    for updates in several:
        for component, update in updates.items():
            if not (isinstance(update, dict) and "__type__" in update):
                update = gr.update(value=update)
            result[component] = {**result.get(component, {}), **update}
    return result


class Page:
    """The page's components and their event handlers. Handlers return Gradio updates.

    Args:
        generator: generates the replies.
        catalogue: reads the available runs and models from the store; called once per browser.
        agreement: of the store's votes with reward models.

    Attributes:
        components: by name; `layout.build` fills it and the lists below, one item per column.
        stops: session -> event that stops the replies of that browser.
    """

    def __init__(
        self,
        generator: ReplyGenerator,
        catalogue: Callable[[], list[RunChoices]],
        agreement: Agreement,
    ) -> None:
        self.generator = generator
        self.catalogue = catalogue
        self.agreement = agreement
        self.stops: dict[str, threading.Event] = {}
        self.components: dict[str, Any] = {}
        self.chats: list[Any] = []
        self.buttons: list[Any] = []
        self.verdicts: dict[Verdict, Any] = {}
        self.thumbs: list[tuple[Any, Any]] = []  # up and down
        self.columns: list[Any] = []
        self.names: list[Any] = []

    def open(self, request: gr.Request) -> Updates:
        """A browser opens the page: set its language, list the runs."""
        language = language_of(request.headers.get("accept-language", ""))
        labels = self.relabel(language, Conversation())
        return merge_updates(
            {self.components["language"]: language}, labels, self.refresh(language, True)
        )

    def refresh(self, language: str, blind: bool) -> Updates:
        """Read the store again and select the newest run."""
        try:
            runs = [run for run in self.catalogue() if run.models]
        except RLHFError as error:
            text = translate(language, "store", error=error_text(error))
            return {self.components["status"]: text}
        if not runs:
            return {self.components["status"]: translate(language, "no_models")}
        choices = [(run.title, run.id) for run in runs]
        return {
            self.components["runs"]: runs,
            self.components["run"]: gr.update(choices=choices, value=runs[0].id),
            **self.select_run(language, runs, runs[0].id, blind),
        }

    def select_run(
        self, language: str, runs: list[RunChoices], chosen: str, blind: bool
    ) -> Updates:
        """Offer the models of another run."""
        run = _find(runs, chosen)
        names = [choice.name for choice in run.models]
        return {
            self.components["models"]: gr.update(choices=names, value=run.suggested()),
            self.components["agreement"]: self._agreement(language, run),
            **self.select_models(language, runs, chosen, run.suggested(), blind),
        }

    def select_models(
        self, language: str, runs: list[RunChoices], chosen: str, names: list[str], blind: bool
    ) -> Updates:
        """Start a new conversation with other models."""
        choices = _find(runs, chosen).chosen(names) if runs else []
        return self.reset(language, Conversation.of(choices), blind)

    def reset(self, language: str, conversation: Conversation, blind: bool) -> Updates:
        """Start a new conversation with the same models."""
        conversation = Conversation.of(conversation.choices, blind)
        updates = self._updates(language, conversation, "")
        for i in range(COLUMNS):
            updates[self.columns[i]] = gr.update(visible=i < len(conversation.choices))
            updates[self.chats[i]] = []
        return updates

    def relabel(self, language: str, conversation: Conversation) -> Updates:
        """Show all fixed texts in a language."""
        c = self.components
        labels = (
            "run", "length", "temperature", "top_p", "system", "common", "blind", "message",
            "settings", "language", "examples",
        )  # fmt: skip
        values = ("ask", "stop", "new", "refresh", "intro")
        updates: Updates = {c[key]: gr.update(label=translate(language, key)) for key in labels}
        updates |= {c[key]: gr.update(value=translate(language, key)) for key in values}
        updates[c["title"]] = f"# {translate(language, 'title')}"
        updates[c["models"]] = gr.update(label=translate(language, "models", most=COLUMNS))
        return {**updates, **self._shown(language, conversation)}

    def ask(
        self, language: str, runs: list[RunChoices], chosen: str, conversation: Conversation,
        message: str, length: float, temperature: float, top_p: float, system: str, common: bool,
        request: gr.Request,
    ) -> Iterator[Updates]:  # fmt: skip
        """Send the message to all models; stream their replies, then their scores."""
        status = self.components["status"]
        if not message.strip():
            return
        if not conversation.choices:
            yield {status: translate(language, "pick")}
            return
        run = _find(runs, chosen)
        prompts = conversation.begin(message.strip(), common, (system or "").strip() or None)
        stop = self.stops[str(request.session_hash)] = threading.Event()
        first: Updates = {
            self.components["message"]: "",
            status: "",
            **self._shown(language, conversation),
        }
        streamed = self.generator.generate(
            conversation.choices, prompts, Sampling(int(length), temperature, top_p),
            system=conversation.system, reward_models=run.reward_models, stop=stop,
        )  # fmt: skip
        replies = []
        for replies in streamed:
            shown = bubbles(language, conversation, replies)
            yield {**first, **dict(zip(self.chats, shown, strict=False))}
            first = {}
        conversation.finish(replies)
        obstacle = conversation.vote_obstacle()
        silent = obstacle in ("", "nothing")
        text = "" if silent else translate(language, f"obstacle_{obstacle}")
        yield self._updates(language, conversation, text)

    def stop(self, request: gr.Request) -> None:
        """Stop the replies of this browser where they are."""
        if event := self.stops.get(str(request.session_hash)):
            event.set()

    def close(self, request: gr.Request) -> None:
        """A browser leaves the page."""
        self.stop(request)
        self.stops.pop(str(request.session_hash), None)

    def vote(
        self, index: int, language: str, run: RunChoices, conversation: Conversation,
        details: dict[str, Any],
    ) -> Updates:  # fmt: skip
        """Save that one reply is better than the others."""
        if not conversation.can_vote(index):
            return self._feedback_buttons(language, conversation)
        try:
            votes = conversation.vote(index, details)
            for vote in votes:
                save_vote(self.generator.store, vote)
            name, count = conversation.choices[index].name, VOTES.count(self.generator.store)
            status = translate(language, "saved", name=name, count=count)
        except RLHFError as error:
            conversation.best = None
            status = translate(language, "not_saved", error=error_text(error))
        if not votes:
            status = translate(language, "obstacle_empty")
        return self._updates(language, conversation, status) | {
            self.components["agreement"]: self._agreement(language, run)
        }

    def undecided(
        self, verdict: Verdict, language: str, run: RunChoices, conversation: Conversation,
        details: dict[str, Any],
    ) -> Updates:  # fmt: skip
        """Save that no reply is better."""
        if not conversation.can_vote(verdict):
            return self._feedback_buttons(language, conversation)
        store = self.generator.store
        try:
            save_undecided(store, conversation.undecided(verdict, details))
            said = translate(language, self._verdict_label(verdict, conversation))
            status = translate(
                language, "undecided_saved", verdict=said.lower(), count=VOTES.count(store)
            )
        except RLHFError as error:
            conversation.verdict = None
            status = translate(language, "not_saved", error=error_text(error))
        return self._updates(language, conversation, status)

    def thumb(
        self, index: int, good: bool, language: str, run: RunChoices, conversation: Conversation,
        details: dict[str, Any],
    ) -> Updates:  # fmt: skip
        """Save that one reply is good, or bad."""
        if not conversation.can_judge(index):
            return self._feedback_buttons(language, conversation)
        store = self.generator.store
        try:
            save_thumb(store, conversation.thumb(index, good, details))
            status = translate(
                language, "thumb_saved", verdict=translate(language, "good" if good else "bad"),
                name=shown_name(language, conversation, index), count=THUMBS.count(store),
            )  # fmt: skip
        except RLHFError as error:
            conversation.thumbs.pop(index)
            status = translate(language, "thumb_not_saved", error=error_text(error))
        return self._updates(language, conversation, status)

    def _updates(self, language: str, conversation: Conversation, status: str) -> Updates:
        """The state after an event: conversation, status line, and what follows from them."""
        return {
            self.components["conversation"]: conversation,
            self.components["status"]: status,
            **self._shown(language, conversation),
        }

    def _shown(self, language: str, conversation: Conversation) -> Updates:
        """Names, replies as far as they are complete, and feedback buttons."""
        updates = self._feedback_buttons(language, conversation)
        for i, name in enumerate(self.names):
            used = i < len(conversation.choices)
            updates[name] = f"### {shown_name(language, conversation, i)}" if used else ""
        if conversation.last:
            shown = bubbles(language, conversation, conversation.last)
            updates |= dict(zip(self.chats, shown, strict=False))
        return updates

    def _agreement(self, language: str, run: RunChoices) -> str:
        """How often voters and the run's reward model agree; empty without a reward model."""
        if run.reward_models is None:
            return ""
        try:
            found = self.agreement.of(run)
        except RLHFError:
            return ""  # the store's errors are told where they stop somebody
        return translate(language, "agreement" if found else "no_agreement", **(found or {}))

    def _verdict_label(self, verdict: Verdict, conversation: Conversation) -> str:
        return "all_bad" if verdict == "both_bad" and len(conversation.choices) > 2 else verdict

    def _feedback_buttons(self, language: str, conversation: Conversation) -> Updates:
        """Labels and states of the vote and thumb buttons."""
        two = len(conversation.choices) == 2
        updates = {}
        for i, button in enumerate(self.buttons):
            key = ("left", "right")[i] if two and i < 2 else "best"
            answered = i < len(conversation.last) and conversation.last[i].state == "done"
            updates[button] = gr.update(
                value=translate(language, key),
                interactive=answered and conversation.can_vote(i),
                variant="primary" if conversation.best == i else "secondary",
                visible=len(conversation.choices) > 1,
            )
        for verdict, button in self.verdicts.items():
            updates[button] = gr.update(
                value=translate(language, self._verdict_label(verdict, conversation)),
                interactive=bool(conversation.last) and conversation.can_vote(verdict),
                variant="primary" if conversation.verdict == verdict else "secondary",
                visible=len(conversation.choices) > 1,
            )
        for i, buttons in enumerate(self.thumbs):
            for button, good in zip(buttons, (True, False), strict=True):
                updates[button] = gr.update(
                    value=translate(language, "up" if good else "down"),
                    interactive=conversation.can_judge(i),
                    variant="primary" if conversation.thumbs.get(i) is good else "secondary",
                )
        return updates


def _find(runs: list[RunChoices], chosen: str) -> RunChoices:
    return next(run for run in runs if run.id == chosen)


def details(
    run: RunChoices,
    blind: bool,
    length: float,
    temperature: float,
    top_p: float,
    request: gr.Request,
) -> dict[str, Any]:
    """What is stored with a vote or a thumb: run, user, sampling settings, who gave the scores,
    and whether it was given without knowing the models."""
    return {
        "run": run.id,
        "by": request.username,
        "blind": blind,
        "reward_models": list(run.reward_models.digests) if run.reward_models else [],
        "sampling": {"max_new_tokens": length, "temperature": temperature, "top_p": top_p},
    }
