"""The page's components, their places and their event handlers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

from rlhf_core.data.sources.votes import Verdict
from rlhf_core.playground.catalogue import RunChoices
from rlhf_core.playground.conversation import Conversation
from rlhf_core.playground.page import Page, Updates, details, gr
from rlhf_core.playground.render import COLUMNS
from rlhf_core.playground.texts import EXAMPLES, LANGUAGES, translate

FONTS = [
    "system-ui",
    "Noto Sans",
    "Noto Sans CJK SC",
    "PingFang SC",
    "Microsoft YaHei",
    "Noto Color Emoji",
    "sans-serif",
]
CSS = """
footer, .pane button[aria-label="Clear"], .pane .top-panel { display: none !important }
.message .md { white-space: pre-wrap; overflow-wrap: anywhere }
.score { margin-top: .6em; opacity: .75; font-size: .85em; font-variant-numeric: tabular-nums }
.note { opacity: .6; font-style: italic }
.low { align-items: flex-end }
.verdicts { justify-content: center }
#agreement { text-align: center; opacity: .8; font-size: .9em }
"""


def build(page: Page) -> gr.Blocks:
    """Lay out the page, in English until a browser sends its language."""
    c = page.components

    def text(key: str) -> str:
        return translate("en", key, most=COLUMNS)

    with gr.Blocks(title="rlhf playground", analytics_enabled=False, fill_width=True) as blocks:
        c["runs"] = gr.State([])
        c["conversation"] = gr.State(Conversation())
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
            c["refresh"] = gr.Button(text("refresh"), scale=0, min_width=210)
        _settings(c, text)
        _panes(page, text)
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
            c["new"] = gr.Button(text("new"), elem_id="new", scale=0, min_width=210)
        c["agreement"] = gr.Markdown("", elem_id="agreement")
        c["examples"] = gr.Dataset(
            components=[c["message"]], samples=[[e] for e in EXAMPLES], label=text("examples")
        )
        _connect(page, blocks)
    return blocks


def _panes(page: Page, text: Callable[[str], str]) -> None:
    """A column per model, with what can be said about its reply, and what about all of them."""
    with gr.Row():
        for i in range(COLUMNS):
            with gr.Column(visible=i < 2, min_width=280, elem_classes="pane") as column:
                page.names.append(gr.Markdown("", elem_id=f"name-{i}"))
                page.chats.append(
                    gr.Chatbot(  # its contents are escaped, see `render`
                        show_label=False, height=380, elem_id=f"chat-{i}", buttons=[],
                        render_markdown=False, latex_delimiters=[],
                    )
                )  # fmt: skip
                with gr.Row():
                    up, down = (
                        gr.Button(text(key), elem_id=f"{key}-{i}", size="sm", min_width=60)
                        for key in ("up", "down")
                    )
                page.thumbs.append((up, down))
                page.buttons.append(gr.Button(text("best"), elem_id=f"vote-{i}"))
            page.columns.append(column)
    with gr.Row(elem_classes="verdicts"):
        for verdict in get_args(Verdict):
            button = gr.Button(text(verdict), elem_id=verdict, scale=0, min_width=170)
            page.verdicts[verdict] = button


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
            with gr.Column(scale=2):
                c["blind"] = gr.Checkbox(True, label=text("blind"), elem_id="blind")
                c["common"] = gr.Checkbox(True, label=text("common"))


def _connect(page: Page, blocks: gr.Blocks) -> None:
    """Attach the handlers of `page` to the components. None of them is offered as an API."""
    c = page.components
    thumbs = [button for pair in page.thumbs for button in pair]
    everything = [
        *c.values(), *page.chats, *page.buttons, *page.verdicts.values(), *thumbs, *page.columns,
        *page.names,
    ]  # fmt: skip
    hidden: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
    whole: dict[str, Any] = {"outputs": everything, **hidden}
    language, runs, run, conversation = c["language"], c["runs"], c["run"], c["conversation"]
    sampling, blind = [c["length"], c["temperature"], c["top_p"]], c["blind"]

    blocks.load(page.open, None, **whole)
    blocks.unload(page.close)
    language.input(page.relabel, [language, conversation], **whole)
    c["refresh"].click(page.refresh, [language, blind], **whole)
    run.input(page.select_run, [language, runs, run, blind], **whole)
    c["models"].input(page.select_models, [language, runs, run, c["models"], blind], **whole)
    c["new"].click(page.reset, [language, conversation, blind], **whole)
    blind.input(page.reset, [language, conversation, blind], **whole)
    question = [language, runs, run, conversation, c["message"]]
    gr.on(
        [c["ask"].click, c["message"].submit],
        page.ask,
        [*question, *sampling, c["system"], c["common"]],
        concurrency_limit=1,
        trigger_mode="once",
        **whole,
    )
    c["stop"].click(page.stop, None, None, **hidden)
    c["examples"].click(lambda sample: sample[0], c["examples"], c["message"], **hidden)
    feedback = [language, runs, run, conversation, *sampling]
    for verdict, button in page.verdicts.items():
        button.click(_handler(page.undecided, verdict), feedback, **whole)
    for i, button in enumerate(page.buttons):
        button.click(_handler(page.vote, i), feedback, **whole)
    for i, buttons in enumerate(page.thumbs):
        for button, good in zip(buttons, (True, False), strict=True):
            button.click(_handler(page.thumb, i, good), feedback, **whole)


def _handler(
    action: Callable[..., Updates], *arguments: int | bool | str
) -> Callable[..., Updates]:
    """Feedback as Gradio calls it; it finds the request by its annotation."""

    def clicked(
        language: str, runs: list[RunChoices], chosen: str, conversation: Conversation,
        length: float, temperature: float, top_p: float, request: gr.Request,
    ) -> Updates:  # fmt: skip
        run = next(run for run in runs if run.id == chosen)
        stored = details(run, conversation.hidden, length, temperature, top_p, request)
        return action(*arguments, language, run, conversation, stored)

    return clicked
