"""The page: replies of several models side by side, their scores, and votes on them.

`Page` holds what the page does; `build` lays it out. Nothing is asked of other machines: analytics,
update checks and web fonts are off.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from typing import Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import gradio as gr

from rlhf_core.errors import RLHFError
from rlhf_core.playground.asking import Asker, describe
from rlhf_core.playground.catalogue import RunChoices
from rlhf_core.playground.conversation import Conversation
from rlhf_core.playground.render import COLUMNS, bubbles
from rlhf_core.playground.texts import EXAMPLES, LANGUAGES, language_of, say
from rlhf_core.playground.votes import count_votes, save_vote
from rlhf_core.replies import Sampling

FONTS = [
    "system-ui",
    "Noto Sans",
    "Noto Sans CJK SC",
    "PingFang SC",
    "Microsoft YaHei",
    "sans-serif",
]
CSS = """
footer, .pane button[aria-label="Clear"], .pane .top-panel { display: none !important }
.score { opacity: .75; font-size: .85em }
.low { align-items: flex-end }
"""

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
        return {**updates, **self._voting(language, talk)}

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
        return {**updates, **self._voting(language, talk)}

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
        begin = {self.c["message"]: "", self.c["status"]: "", **self._voting(language, talk)}
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
            self.c["talk"]: talk, self.c["status"]: status, **self._voting(language, talk)
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
            return self._voting(language, talk)
        details = {
            "run": chosen,
            "by": request.username,
            "sampling": {"max_new_tokens": length, "temperature": temperature, "top_p": top_p},
        }
        try:
            votes = talk.vote(place, details)
            for vote in votes:
                save_vote(self.asker.store, vote)
            name, count = talk.choices[place].name, count_votes(self.asker.store)
            status = say(language, "saved", name=name, count=count)
        except RLHFError as error:
            talk.best = None
            status = say(language, "not_saved", error=describe(error))
        if not votes:
            status = say(language, "obstacle_empty")
        return {
            self.c["talk"]: talk, self.c["status"]: status, **self._voting(language, talk)
        }  # fmt: skip

    def _voting(self, language: str, talk: Conversation) -> Updates:
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
        return updates


def build(page: Page) -> gr.Blocks:
    """Lay the page out, in English until a browser says what it wants."""
    c = page.c

    def text(key: str) -> str:
        return say("en", key, most=COLUMNS)

    with gr.Blocks(title="rlhf playground", analytics_enabled=False, fill_width=True) as blocks:
        c["runs"] = gr.State([])
        c["talk"] = gr.State(Conversation())
        with gr.Row(equal_height=True):
            with gr.Column(scale=5):
                c["title"] = gr.Markdown(f"# {text('title')}")
                c["intro"] = gr.Markdown(text("intro"))
            languages = [(name, code) for code, name in LANGUAGES.items()]
            c["language"] = gr.Radio(languages, value="en", label=text("language"), scale=1)
        with gr.Row(elem_classes="low"):
            c["run"] = gr.Dropdown([], label=text("run"), scale=2)
            c["models"] = gr.Dropdown(
                [], label=text("models"), multiselect=True, max_choices=COLUMNS, scale=4,
                elem_id="models",
            )  # fmt: skip
            c["refresh"] = gr.Button(text("refresh"), scale=0, min_width=170)
        _settings(c, text)
        with gr.Row():
            for i in range(COLUMNS):
                with gr.Column(visible=i < 2, min_width=280, elem_classes="pane") as column:
                    page.names.append(gr.Markdown("", elem_id=f"name-{i}"))
                    page.chats.append(
                        gr.Chatbot(
                            show_label=False, height=380, elem_id=f"chat-{i}", buttons=["copy"]
                        )
                    )
                    page.buttons.append(gr.Button(text("best"), elem_id=f"vote-{i}"))
                page.columns.append(column)
        c["status"] = gr.Markdown("", elem_id="status")
        with gr.Row(elem_classes="low"):
            c["message"] = gr.Textbox(
                "", label=text("message"), lines=1, max_lines=6, scale=8, elem_id="message",
                autofocus=True,
            )  # fmt: skip
            c["ask"] = gr.Button(
                text("ask"), variant="primary", elem_id="ask", scale=0, min_width=110
            )
            c["stop"] = gr.Button(text("stop"), elem_id="stop", scale=0, min_width=90)
            c["new"] = gr.Button(text("new"), elem_id="new", scale=0, min_width=130)
        c["examples"] = gr.Dataset(
            components=[c["message"]], samples=[[e] for e in EXAMPLES], label=text("examples")
        )
        _connect(page, blocks)
    return blocks


def _settings(c: dict[str, Any], text: Callable[[str], str]) -> None:
    with gr.Accordion(text("settings"), open=False) as c["settings"]:
        with gr.Row():
            c["length"] = gr.Slider(8, 2048, 256, step=8, label=text("length"), elem_id="length")
            c["temperature"] = gr.Slider(
                0, 2, 0.7, step=0.05, label=text("temperature"), elem_id="temperature"
            )
            c["top_p"] = gr.Slider(0.05, 1, 1, step=0.05, label=text("top_p"), elem_id="top-p")
        with gr.Row(equal_height=True):
            c["system"] = gr.Textbox("", label=text("system"), scale=3)
            c["common"] = gr.Checkbox(True, label=text("common"), scale=2)


def _connect(page: Page, blocks: gr.Blocks) -> None:
    """Which component calls what. Nothing of it is offered as an API."""
    c = page.c
    everything = [*c.values(), *page.chats, *page.buttons, *page.columns, *page.names]
    hidden: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
    whole: dict[str, Any] = {"outputs": everything, **hidden}
    language, runs, run, talk = c["language"], c["runs"], c["run"], c["talk"]
    sampling = [c["length"], c["temperature"], c["top_p"]]

    blocks.load(page.open, None, **whole)
    blocks.unload(page.leave)
    language.input(page.relabel, [language, talk], **whole)
    c["refresh"].click(page.look, [language], **whole)
    run.input(page.choose_run, [language, runs, run], **whole)
    c["models"].input(page.choose_models, [language, runs, run, c["models"]], **whole)
    c["new"].click(page.fresh, [language, talk], **whole)
    question = [language, runs, run, talk, c["message"], *sampling, c["system"], c["common"]]
    gr.on(
        [c["ask"].click, c["message"].submit], page.ask, question,
        concurrency_limit=1, trigger_mode="once", **whole,
    )  # fmt: skip
    c["stop"].click(page.stop, None, None, **hidden)
    c["examples"].click(lambda sample: sample[0], c["examples"], c["message"], **hidden)
    for i, button in enumerate(page.buttons):
        button.click(_voter(page, i), [language, run, talk, *sampling], **whole)


def _voter(page: Page, place: int) -> Callable[..., Updates]:
    def vote(
        language: str, run: str, talk: Conversation, length: float, temperature: float,
        top_p: float, request: gr.Request,
    ) -> Updates:  # fmt: skip
        return page.vote(place, language, run, talk, length, temperature, top_p, request)

    return vote
