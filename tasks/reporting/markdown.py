"""Markdown for people: tables, sample replies, images, and a self-contained page of it."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Mapping, Sequence
from typing import Any

from tasks.events import table_cell

IMAGES = ("data:image/png;base64,", "data:image/svg+xml;base64,")


def table(rows: Sequence[Sequence[str]]) -> str:
    """A table, its heads first; texts are escaped. All columns but the first are right-aligned."""
    heads, *body = [[table_cell(text) if text else "" for text in row] for row in rows]
    rule = ["---", *["---:"] * (len(heads) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (heads, rule, *body))


def sample_table(sample: Mapping[str, Any], names: Mapping[str, str]) -> str:
    """A prompt with the replies of several models, and their scores.

    Args:
        sample: "prompt", model -> reply, "greedy" -> model -> reply, and "reward" and "gold" ->
            model -> score.
        names: model -> its display name.
    """
    judges = [judge for judge in ("reward", "gold") if sample.get(judge)]
    rows = [
        f"> {table_cell(sample.get('prompt', ''))}",
        "",
        f"| | {' | '.join(['reply', *judges])} |",
        "| --- | --- |" + " ---: |" * len(judges),
    ]
    for name, label in names.items():
        if name in sample:
            scores = [sample[judge].get(name) for judge in judges]
            cells = ["" if score is None else f"{score:.2f}" for score in scores]
            rows.append(f"| {' | '.join([label, table_cell(sample[name]), *cells])} |")
            if greedy := (sample.get("greedy") or {}).get(name):
                rows.append(f"| {label}, greedy | {table_cell(greedy)} |" + " |" * len(judges))
    return "\n".join(rows)


def folded(title: str, text: str) -> str:
    """A block of text that a page shows when it is asked to.

    It is one block of HTML, which an empty line would end: Prefect's page would then show the text
    outside of the fold.
    """
    inner = html.escape(text.strip(), quote=False).replace("\n\n", "\n&#10;")
    head = f"<details><summary>{html.escape(title)}</summary>"
    return f"{head}<pre>{inner}</pre></details>"


def embedded(content: bytes, kind: str) -> str:
    """An image as a URL that holds it.

    Args:
        kind: png or svg+xml.
    """
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def page(title: str, markdown: str) -> str:
    """A self-contained HTML page."""
    from markdown_it import MarkdownIt

    renderer = MarkdownIt("commonmark").enable("table")
    renderer.validateLink = _safe_link  # type: ignore[method-assign]
    body = renderer.render(markdown)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>
<meta name="viewport" content="width=device-width"><style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem;
  color: #1f2937; background: #fff }}
table {{ border-collapse: collapse; margin: 1rem 0; font-size: .92rem; display: block;
  overflow-x: auto }}
th, td {{ border-bottom: 1px solid #e5e7eb; padding: .35rem .7rem; text-align: left;
  vertical-align: top }}
th {{ background: #f9fafb }} img {{ max-width: 100% }}
code {{ background: #f3f4f6; padding: .1em .3em; border-radius: 4px; font-size: .88em }}
pre {{ background: #f3f4f6; padding: .7rem 1rem; border-radius: 4px; overflow-x: auto }}
pre code {{ padding: 0 }} summary {{ cursor: pointer }}
blockquote {{ border-left: 4px solid #2563eb; margin: 1.5rem 0 .3rem; padding: .1rem 1rem;
  background: #f9fafb }}
</style></head><body>
{body}</body></html>
"""


def _safe_link(url: str) -> bool:
    return url.startswith(IMAGES) or not re.match(r"(?i)(javascript|data|file|vbscript):", url)
