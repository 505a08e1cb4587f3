"""The lineage of a run's artifacts, drawn as an SVG.

A layered drawing (Sugiyama, Tagawa and Toda 1981): an artifact stands right of all that it was made
from; an arrow that passes a layer has a place of its own there, so that it crosses no box.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

WIDTH, HEIGHT = 156, 54  # of a box
GAP_X, GAP_Y, THIN = 54, 16, 10  # between layers, between boxes; height of a passing arrow
SWEEPS = 4
LONGEST, LONGEST_SOURCE = 22, 28  # characters of a name, and of a source
COLOURS = {"dataset": "#fef3c7", "model": "#dbeafe", "reward_model": "#ede9fe",
           "evaluation": "#dcfce7", "benchmarks": "#dcfce7", "published": "#fee2e2"}  # fmt: skip
OTHER = "#f3f4f6"


@dataclass(frozen=True)
class Node:
    """An artifact.

    Attributes:
        title: its stage. ref: kind/digest.
        parents: keys of those that it was made from.
        source: where it comes from, if from outside.
    """

    title: str
    ref: str
    parents: Sequence[str] = ()
    source: str = ""


Place = tuple[str, int]
"""A node's key and its layer: of the node itself, or where an arrow to it passes."""


def draw(nodes: Mapping[str, Node]) -> str:
    """An SVG of the nodes by their keys; parents that are not among them are left out."""
    layers = _layers(nodes)
    arrows = [(p, key) for key, node in nodes.items() for p in dict.fromkeys(node.parents)]
    paths = [_path(*arrow, layers) for arrow in arrows if arrow[0] in nodes]
    columns = _ordered(layers, paths)
    at = {}
    heights = [sum(_height(p, layers) + GAP_Y for p in column) - GAP_Y for column in columns]
    for number, column in enumerate(columns):
        y = (max(heights, default=0) - heights[number]) / 2
        for place in column:
            at[place] = (number * (WIDTH + GAP_X), y + _height(place, layers) / 2)
            y += _height(place, layers) + GAP_Y
    width, height = len(columns) * (WIDTH + GAP_X) - GAP_X, max(heights, default=0)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="-4 -4 {width + 8} {height + 8:g}" '
        f'width="{width + 8}" height="{height + 8:g}" font-family="system-ui, sans-serif">'
    ]
    lines += [_curve(path, at, layers) for path in paths]
    lines += [_box(node, at[(key, layers[key])]) for key, node in nodes.items()]
    return "\n".join([*lines, "</svg>"])


def _layers(nodes: Mapping[str, Node]) -> dict[str, int]:
    """Layer of each node: the longest way to it. Artifacts have no cycles: a parent is older."""
    found: dict[str, int] = {}

    def layer(key: str) -> int:
        if key not in found:
            found[key] = 0
            known = [layer(p) for p in nodes[key].parents if p in nodes]
            found[key] = 1 + max(known, default=-1)
        return found[key]

    for key in nodes:
        layer(key)
    return found


def _path(start: str, end: str, layers: Mapping[str, int]) -> list[Place]:
    """Start, the places where the arrow passes other layers, end. Arrows from one node share them
    for as long as they can."""
    between = [(f"{start}\0", number) for number in range(layers[start] + 1, layers[end])]
    return [(start, layers[start]), *between, (end, layers[end])]


def _ordered(layers: Mapping[str, int], paths: Sequence[Sequence[Place]]) -> list[list[Place]]:
    """The places of each layer from top to bottom, each near the mean of its neighbours."""
    columns: list[list[Place]] = [[] for _ in range(1 + max(layers.values(), default=-1))]
    for place in dict.fromkeys([*layers.items(), *(p for path in paths for p in path)]):
        columns[place[1]].append(place)
    neighbours: dict[Place, set[Place]] = {place: set() for column in columns for place in column}
    for path in paths:
        for left, right in pairwise(path):
            neighbours[left].add(right)
            neighbours[right].add(left)
    for sweep in range(SWEEPS):
        for column in columns[:: 1 if sweep % 2 == 0 else -1]:
            rank = {p: i / len(other) for other in columns for i, p in enumerate(other)}
            column.sort(
                key=lambda p: sum(rank[n] for n in neighbours[p]) / max(1, len(neighbours[p]))
            )
    return columns


def _height(place: Place, layers: Mapping[str, int]) -> int:
    return HEIGHT if place[0] in layers else THIN


def _curve(
    path: Sequence[Place], at: Mapping[Place, tuple[float, float]], layers: Mapping[str, int]
) -> str:
    x, y = at[path[0]]
    text = f"M{x + WIDTH:g},{y:g}"
    for place in path[1:]:
        (left, y0), (x, y) = (x + WIDTH, y), at[place]
        middle = (left + x) / 2
        text += f" C{middle:g},{y0:g} {middle:g},{y:g} {x:g},{y:g}"
        if place[0] not in layers:
            text += f" L{x + WIDTH:g},{y:g}"
    return f'<path d="{text}" fill="none" stroke="#9ca3af" stroke-width="1.3"/>'


def _box(node: Node, at: tuple[float, float]) -> str:
    x, y = at
    fill = COLOURS.get(node.ref.partition("/")[0], OTHER)
    about = " ".join(filter(None, [node.title, node.ref, node.source]))
    title = node.title if len(node.title) <= LONGEST else f"{node.title[: LONGEST - 1]}…"
    lines = [(13, 600, "#111827", title), (10, 400, "#4b5563", node.ref)]
    if node.source:
        lines.append((10, 400, "#4b5563", _cut(node.source)))
    top = y + 5 - 8 * (len(lines) - 1)
    return (
        f"<g><title>{html.escape(about)}</title>"
        f'<rect x="{x:g}" y="{y - HEIGHT / 2:g}" width="{WIDTH}" height="{HEIGHT}" rx="6" '
        f'fill="{fill}" stroke="#6b7280"/>'
        + "".join(
            f'<text x="{x + WIDTH / 2:g}" y="{top + 16 * number:g}" text-anchor="middle" '
            f'font-size="{size}" font-weight="{weight}" fill="{colour}">'
            f"{html.escape(text)}</text>"
            for number, (size, weight, colour, text) in enumerate(lines)
        )
        + "</g>"
    )


def _cut(source: str) -> str:
    """The text, without its middle if it is too long: a path's end tells more than its start."""
    if len(source) <= LONGEST_SOURCE:
        return source
    half = LONGEST_SOURCE // 2
    return f"{source[: half - 1]}…{source[-half:]}"
