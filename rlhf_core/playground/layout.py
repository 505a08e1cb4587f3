"""The page's components, their places and their event handlers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rlhf_core.playground.conversation import Conversation
from rlhf_core.playground.page import Page, Updates, gr
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
.score { opacity: .75; font-size: .85em }
.low { align-items: flex-end }
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
                    with gr.Row():
                        up, down = (
                            gr.Button(text(key), elem_id=f"{key}-{i}", size="sm", min_width=60)
                            for key in ("up", "down")
                        )
                    page.thumbs.append((up, down))
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
    """Attach the handlers of `page` to the components. None of them is offered as an API."""
    c = page.components
    thumbs = [button for pair in page.thumbs for button in pair]
    everything = [*c.values(), *page.chats, *page.buttons, *thumbs, *page.columns, *page.names]
    hidden: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
    whole: dict[str, Any] = {"outputs": everything, **hidden}
    language, runs, run, conversation = c["language"], c["runs"], c["run"], c["conversation"]
    sampling = [c["length"], c["temperature"], c["top_p"]]

    blocks.load(page.open, None, **whole)
    blocks.unload(page.close)
    language.input(page.relabel, [language, conversation], **whole)
    c["refresh"].click(page.refresh, [language], **whole)
    run.input(page.select_run, [language, runs, run], **whole)
    c["models"].input(page.select_models, [language, runs, run, c["models"]], **whole)
    c["new"].click(page.reset, [language, conversation], **whole)
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
    feedback = [language, run, conversation, *sampling]
    for i, button in enumerate(page.buttons):
        button.click(_handler(page.vote, i), feedback, **whole)
    for i, buttons in enumerate(page.thumbs):
        for button, good in zip(buttons, (True, False), strict=True):
            button.click(_handler(page.thumb, i, good), feedback, **whole)


def _handler(action: Callable[..., Updates], *arguments: int | bool) -> Callable[..., Updates]:
    """An action of one column as Gradio calls it; it finds the request by its annotation."""

    def clicked(
        language: str, run: str, conversation: Conversation, length: float, temperature: float,
        top_p: float, request: gr.Request,
    ) -> Updates:  # fmt: skip
        return action(*arguments, language, run, conversation, length, temperature, top_p, request)

    return clicked
