"""The parts of the site that are not files in docs/.

mkdocs calls `on_config`, `on_files` and `on_page_markdown` (see `hooks` in mkdocs.yml). They add
README, CONTRIBUTING, SECURITY and CHANGELOG as pages, and one API page for each room of rlhf_core.
griffe loads `SharedLines`. Both read the source and import nothing of it.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
ROOT_PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "CHANGELOG.md": "changelog.md",
}
LINK = re.compile(r"\[([^\]]*)\]\(([^)\s]+)\)")
API = "API"


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Fill the nav's empty section `API` with a page for each room."""
    for section in config.nav or []:
        for pages in section.values():
            for page in pages:
                if isinstance(page, dict) and API in page:
                    page[API] = [{room: f"api/{room}.md"} for room in rooms()]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the root's pages and the API pages."""
    for name, page in ROOT_PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / name).read_text("utf-8")))
    for room, modules in rooms().items():
        text = f"# rlhf_core.{room}\n\n" + "\n".join(f"::: {module}\n" for module in modules)
        files.append(File.generated(config, f"api/{room}.md", content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links that are right in the repository into links that are right on the site."""
    return LINK.sub(_site_link, markdown)


def rooms() -> dict[str, list[str]]:
    """Room of rlhf_core -> its modules, those with an empty `__init__.py` left out."""
    found: dict[str, list[str]] = {}
    for path in sorted((ROOT / "rlhf_core").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if parts[-1] == "__init__":
            parts = parts[:-1]
        if len(parts) > 1 and parts[1] != "__main__" and path.read_text("utf-8").strip():
            found.setdefault(parts[1], []).append(".".join(parts))
    return dict(sorted(found.items()))


def _site_link(match: re.Match[str]) -> str:
    text, target = match.groups()
    path, mark, anchor = target.partition("#")
    inside = path.removeprefix("../").removeprefix("docs/")
    if inside == "LICENSE":
        return text
    return f"[{text}]({ROOT_PAGES.get(inside, inside)}{mark}{anchor})"


class SharedLines(griffe.Extension):
    """Splits lines of a docstring that describe several parameters, as `values, returns: (B,T)`.

    griffe knows one parameter a line. It then checks each name against the signature.
    """

    LINE = re.compile(r"^( +)(\w+(?:, \w+)+)(: .*)$", re.MULTILINE)

    def on_function(self, *, func: griffe.Function, **kwargs: Any) -> None:
        """Rewrite the docstring of each function that is loaded."""
        if func.docstring is not None:
            func.docstring.value = self.LINE.sub(self._split, func.docstring.value)

    @staticmethod
    def _split(match: re.Match[str]) -> str:
        indent, names, text = match.groups()
        *others, last = names.split(", ")
        lines = [f"{indent}{name}: like `{last}`." for name in others]
        return "\n".join([*lines, f"{indent}{last}{text}"])
