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
from rlhf_core.data.sources.votes import VOTES, save_vote
from rlhf_core.errors import RLHFError
from rlhf_core.playground.catalogue import RunChoices
from rlhf_core.playground.conversation import Conversation
from rlhf_core.playground.render import COLUMNS, bubbles
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

    Attributes:
        components: by name; `layout.build` fills it and the lists below, one item per column.
        stops: session -> event that stops the replies of that browser.
    """

    def __init__(
        self, generator: ReplyGenerator, catalogue: Callable[[], list[RunChoices]]
    ) -> None:
        self.generator = generator
        self.catalogue = catalogue
        self.stops: dict[str, threading.Event] = {}
        self.components: dict[str, Any] = {}
        self.chats: list[Any] = []
        self.buttons: list[Any] = []
        self.thumbs: list[tuple[Any, Any]] = []  # up and down
        self.columns: list[Any] = []
        self.names: list[Any] = []

    def open(self, request: gr.Request) -> Updates:
        """A browser opens the page: set its language, list the runs."""
        language = language_of(request.headers.get("accept-language", ""))
        labels = self.relabel(language, Conversation())
        return merge_updates(
            {self.components["language"]: language}, labels, self.refresh(language)
        )

    def refresh(self, language: str) -> Updates:
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
            **self.select_run(language, runs, runs[0].id),
        }

    def select_run(self, language: str, runs: list[RunChoices], chosen: str) -> Updates:
        """Offer the models of another run."""
        run = next(run for run in runs if run.id == chosen)
        names = [choice.name for choice in run.models]
        return {
            self.components["models"]: gr.update(choices=names, value=run.suggested()),
            **self.select_models(language, runs, chosen, run.suggested()),
        }

    def select_models(
        self, language: str, runs: list[RunChoices], chosen: str, names: list[str]
    ) -> Updates:
        """Start a new conversation with other models."""
        run = next((run for run in runs if run.id == chosen), None)
        return self.reset(language, Conversation.of(run.chosen(names) if run else []))

    def reset(self, language: str, conversation: Conversation) -> Updates:
        """Start a new conversation with the same models."""
        conversation = Conversation.of(conversation.choices)
        updates = self._updates(language, conversation, "")
        for i in range(COLUMNS):
            used = i < len(conversation.choices)
            updates[self.columns[i]] = gr.update(visible=used)
            updates[self.names[i]] = f"### {conversation.choices[i].name}" if used else ""
            updates[self.chats[i]] = []
        return updates

    def relabel(self, language: str, conversation: Conversation) -> Updates:
        """Show all fixed texts in a language."""
        c = self.components
        labels = (
            "run", "length", "temperature", "top_p", "system", "common", "message", "settings",
            "language", "examples",
        )  # fmt: skip
        values = ("ask", "stop", "new", "refresh", "intro")
        updates: Updates = {c[key]: gr.update(label=translate(language, key)) for key in labels}
        updates |= {c[key]: gr.update(value=translate(language, key)) for key in values}
        updates[c["title"]] = f"# {translate(language, 'title')}"
        updates[c["models"]] = gr.update(label=translate(language, "models", most=COLUMNS))
        return {**updates, **self._feedback_buttons(language, conversation)}

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
        run = next(run for run in runs if run.id == chosen)
        prompts = conversation.begin(message.strip(), common, (system or "").strip() or None)
        stop = self.stops[str(request.session_hash)] = threading.Event()
        first: Updates = {
            self.components["message"]: "",
            status: "",
            **self._feedback_buttons(language, conversation),
        }
        streamed = self.generator.generate(
            conversation.choices, prompts, Sampling(int(length), temperature, top_p),
            system=conversation.system, reward_model=run.reward_model, stop=stop,
        )  # fmt: skip
        replies = []
        for replies in streamed:
            shown = bubbles(language, conversation, prompts, replies)
            yield {**first, **dict(zip(self.chats, shown, strict=False))}
            first = {}
        conversation.finish(prompts, replies)
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
        self, index: int, language: str, chosen: str, conversation: Conversation,
        length: float, temperature: float, top_p: float, request: gr.Request,
    ) -> Updates:  # fmt: skip
        """Save that one reply is better than the others."""
        if conversation.vote_obstacle():
            return self._feedback_buttons(language, conversation)
        details = _details(chosen, length, temperature, top_p, request)
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
        return self._updates(language, conversation, status)

    def thumb(
        self, index: int, good: bool, language: str, chosen: str, conversation: Conversation,
        length: float, temperature: float, top_p: float, request: gr.Request,
    ) -> Updates:  # fmt: skip
        """Save that one reply is good, or bad."""
        if not conversation.can_judge(index):
            return self._feedback_buttons(language, conversation)
        details = _details(chosen, length, temperature, top_p, request)
        try:
            save_thumb(self.generator.store, conversation.thumb(index, good, details))
            status = translate(
                language, "thumb_saved", verdict=translate(language, "good" if good else "bad"),
                name=conversation.choices[index].name, count=THUMBS.count(self.generator.store),
            )  # fmt: skip
        except RLHFError as error:
            conversation.thumbs.pop(index)
            status = translate(language, "thumb_not_saved", error=error_text(error))
        return self._updates(language, conversation, status)

    def _updates(self, language: str, conversation: Conversation, status: str) -> Updates:
        """The state after an event: conversation, status line, feedback buttons."""
        return {
            self.components["conversation"]: conversation,
            self.components["status"]: status,
            **self._feedback_buttons(language, conversation),
        }

    def _feedback_buttons(self, language: str, conversation: Conversation) -> Updates:
        """Labels and states of the vote and thumb buttons."""
        two = len(conversation.choices) == 2
        updates = {}
        for i, button in enumerate(self.buttons):
            key = ("left", "right")[i] if two and i < 2 else "best"
            answered = i < len(conversation.last) and conversation.last[i].state == "done"
            updates[button] = gr.update(
                value=translate(language, key),
                interactive=answered and not conversation.vote_obstacle(),
                variant="primary" if conversation.best == i else "secondary",
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


def _details(
    run: str, length: float, temperature: float, top_p: float, request: gr.Request
) -> dict[str, Any]:
    """What is stored with a vote or a thumb: run, user and sampling settings."""
    return {
        "run": run,
        "by": request.username,
        "sampling": {"max_new_tokens": length, "temperature": temperature, "top_p": top_p},
    }
