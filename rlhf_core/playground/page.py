"""The page: replies of several models side by side, their scores, votes and thumbs on them.

Nothing is asked of other machines: analytics, update checks and web fonts are off. Where things
stand: layout.
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
from rlhf_core.playground.asking import Asker, describe
from rlhf_core.playground.catalogue import RunChoices
from rlhf_core.playground.conversation import Conversation
from rlhf_core.playground.render import COLUMNS, bubbles
from rlhf_core.playground.texts import language_of, say

Updates = dict[Any, Any]


def together(*several: Updates) -> Updates:
    """Updates of the same component become one; of the same property the last one counts."""
    result: Updates = {}
    for updates in several:
        for component, update in updates.items():
            if not (isinstance(update, dict) and "__type__" in update):
                update = gr.update(value=update)
            result[component] = {**result.get(component, {}), **update}
    return result


class Page:
    """The page's components and what happens in them.

    Args:
        catalogue: reads what can be chosen from the store; called for each browser that comes.
    """

    def __init__(self, asker: Asker, catalogue: Callable[[], list[RunChoices]]) -> None:
        self.asker = asker
        self.catalogue = catalogue
        self.stops: dict[str, threading.Event] = {}
        self.c: dict[str, Any] = {}
        self.chats: list[Any] = []
        self.buttons: list[Any] = []
        self.thumbs: list[tuple[Any, Any]] = []  # up and down
        self.columns: list[Any] = []
        self.names: list[Any] = []

    # ------------------------------------------------------------------ what happens

    def open(self, request: gr.Request) -> Updates:
        """A browser has come: its language, and what there is to choose."""
        language = language_of(request.headers.get("accept-language", ""))
        labels = self.relabel(language, Conversation())
        return together({self.c["language"]: language}, labels, self.look(language))

    def look(self, language: str) -> Updates:
        """Read the store again; the newest run is chosen."""
        try:
            runs = [run for run in self.catalogue() if run.models]
        except RLHFError as error:
            return {self.c["status"]: say(language, "store", error=describe(error))}
        if not runs:
            return {self.c["status"]: say(language, "no_models")}
        return {
            self.c["runs"]: runs,
            self.c["run"]: gr.update(choices=[(r.title, r.id) for r in runs], value=runs[0].id),
            **self.choose_run(language, runs, runs[0].id),
        }

    def choose_run(self, language: str, runs: list[RunChoices], chosen: str) -> Updates:
        """The models of another run."""
        run = next(run for run in runs if run.id == chosen)
        names = [choice.name for choice in run.models]
        return {
            self.c["models"]: gr.update(choices=names, value=run.suggested()),
            **self.choose_models(language, runs, chosen, run.suggested()),
        }

    def choose_models(
        self, language: str, runs: list[RunChoices], chosen: str, names: list[str]
    ) -> Updates:
        """Other models: the conversation begins anew."""
        run = next((run for run in runs if run.id == chosen), None)
        return self.fresh(language, Conversation.of(run.chosen(names) if run else []))

    def fresh(self, language: str, talk: Conversation) -> Updates:
        """An empty conversation with the same models."""
        talk = Conversation.of(talk.choices)
        updates: Updates = {self.c["talk"]: talk, self.c["status"]: ""}
        for i in range(COLUMNS):
            there = i < len(talk.choices)
            updates[self.columns[i]] = gr.update(visible=there)
            updates[self.names[i]] = f"### {talk.choices[i].name}" if there else ""
            updates[self.chats[i]] = []
        return {**updates, **self._verdicts(language, talk)}

    def relabel(self, language: str, talk: Conversation) -> Updates:
        """All fixed texts in a language."""
        labels = (
            "run", "length", "temperature", "top_p", "system", "common", "message", "settings",
            "language", "examples",
        )  # fmt: skip
        updates: Updates = {self.c[key]: gr.update(label=say(language, key)) for key in labels}
        updates |= {self.c[key]: gr.update(value=say(language, key))
                    for key in ("ask", "stop", "new", "refresh", "intro")}  # fmt: skip
        updates[self.c["title"]] = f"# {say(language, 'title')}"
        updates[self.c["models"]] = gr.update(label=say(language, "models", most=COLUMNS))
        return {**updates, **self._verdicts(language, talk)}

    def ask(
        self, language: str, runs: list[RunChoices], chosen: str, talk: Conversation, message: str,
        length: float, temperature: float, top_p: float, system: str, common: bool,
        request: gr.Request,
    ) -> Iterator[Updates]:  # fmt: skip
        """A question to all models: their replies as they grow, and then the scores."""
        if not message.strip():
            return
        if not talk.choices:
            yield {self.c["status"]: say(language, "pick")}
            return
        run = next(run for run in runs if run.id == chosen)
        asked = talk.begin(message.strip(), common, (system or "").strip() or None)
        stop = self.stops[str(request.session_hash)] = threading.Event()
        begin = {self.c["message"]: "", self.c["status"]: "", **self._verdicts(language, talk)}
        growing = self.asker.ask(
            talk.choices, asked, Sampling(int(length), temperature, top_p),
            system=talk.system, reward_model=run.reward_model, stop=stop,
        )  # fmt: skip
        replies = []
        for replies in growing:
            shown = bubbles(language, talk, asked, replies)
            yield {**begin, **dict(zip(self.chats, shown, strict=False))}
            begin = {}
        talk.finish(asked, replies)
        obstacle = talk.obstacle()
        status = "" if obstacle in ("", "nothing") else say(language, f"obstacle_{obstacle}")
        yield {
            self.c["talk"]: talk, self.c["status"]: status, **self._verdicts(language, talk)
        }  # fmt: skip

    def stop(self, request: gr.Request) -> None:
        """End the replies of this browser where they are."""
        if event := self.stops.get(str(request.session_hash)):
            event.set()

    def leave(self, request: gr.Request) -> None:
        """The browser has gone."""
        self.stop(request)
        self.stops.pop(str(request.session_hash), None)

    def vote(
        self, place: int, language: str, chosen: str, talk: Conversation,
        length: float, temperature: float, top_p: float, request: gr.Request,
    ) -> Updates:  # fmt: skip
        """One reply is better than the others."""
        if talk.obstacle():
            return self._verdicts(language, talk)
        details = _details(chosen, length, temperature, top_p, request)
        try:
            votes = talk.vote(place, details)
            for vote in votes:
                save_vote(self.asker.store, vote)
            name, count = talk.choices[place].name, VOTES.count(self.asker.store)
            status = say(language, "saved", name=name, count=count)
        except RLHFError as error:
            talk.best = None
            status = say(language, "not_saved", error=describe(error))
        if not votes:
            status = say(language, "obstacle_empty")
        return {
            self.c["talk"]: talk, self.c["status"]: status, **self._verdicts(language, talk)
        }  # fmt: skip

    def thumb(
        self, place: int, good: bool, language: str, chosen: str, talk: Conversation,
        length: float, temperature: float, top_p: float, request: gr.Request,
    ) -> Updates:  # fmt: skip
        """One reply is good, or bad."""
        if not talk.can_judge(place):
            return self._verdicts(language, talk)
        details = _details(chosen, length, temperature, top_p, request)
        try:
            save_thumb(self.asker.store, talk.thumb(place, good, details))
            status = say(
                language, "thumb_saved", verdict=say(language, "good" if good else "bad"),
                name=talk.choices[place].name, count=THUMBS.count(self.asker.store),
            )  # fmt: skip
        except RLHFError as error:
            talk.thumbs.pop(place)
            status = say(language, "thumb_not_saved", error=describe(error))
        return {
            self.c["talk"]: talk, self.c["status"]: status, **self._verdicts(language, talk)
        }  # fmt: skip

    def _verdicts(self, language: str, talk: Conversation) -> Updates:
        """The buttons below the replies."""
        two = len(talk.choices) == 2
        updates = {}
        for i, button in enumerate(self.buttons):
            key = ("left", "right")[i] if two and i < 2 else "best"
            answered = i < len(talk.last) and talk.last[i].state == "done"
            updates[button] = gr.update(
                value=say(language, key),
                interactive=answered and not talk.obstacle(),
                variant="primary" if talk.best == i else "secondary",
                visible=len(talk.choices) > 1,
            )
        for i, buttons in enumerate(self.thumbs):
            for button, good in zip(buttons, (True, False), strict=True):
                updates[button] = gr.update(
                    value=say(language, "up" if good else "down"),
                    interactive=talk.can_judge(i),
                    variant="primary" if talk.thumbs.get(i) is good else "secondary",
                )
        return updates


def _details(
    run: str, length: float, temperature: float, top_p: float, request: gr.Request
) -> dict[str, Any]:
    """What is kept with a vote or a thumb."""
    return {
        "run": run,
        "by": request.username,
        "sampling": {"max_new_tokens": length, "temperature": temperature, "top_p": top_p},
    }
