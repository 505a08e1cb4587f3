"""The drawing of a lineage: order, arrows, escaped names."""

import re
import xml.etree.ElementTree as ET

from tasks.reporting.lineage import GAP_X, HEIGHT, WIDTH, Node, draw

SVG = "{http://www.w3.org/2000/svg}"


def boxes(svg):
    """Title -> the box's left and top."""
    found = {}
    for group in ET.fromstring(svg).iter(f"{SVG}g"):
        rect = group.find(f"{SVG}rect")
        title = group.findall(f"{SVG}text")[0].text
        found[title] = float(rect.get("x")), float(rect.get("y"))
    return found


def arrows(svg):
    """Start and end point of each arrow, and the points between them."""
    paths = [path.get("d") for path in ET.fromstring(svg).iter(f"{SVG}path")]
    return [[tuple(map(float, p.split(","))) for p in re.findall(r"[-\d.]+,[-\d.]+", d)]
            for d in paths]  # fmt: skip


NODES = {
    "a": Node("model", "model/a"),
    "b": Node("data", "dataset/b", ["a"]),
    "c": Node("sft", "model/c", ["a", "b"]),
    "d": Node("ppo", "model/d", ["c", "a", "gone"]),
}


def test_artifact_stands_right_of_all_that_it_was_made_from():
    found = boxes(draw(NODES))
    columns = {title: round(x / (WIDTH + GAP_X)) for title, (x, _) in found.items()}
    assert columns == {"model": 0, "data": 1, "sft": 2, "ppo": 3}


def test_each_arrow_leaves_its_parent_enters_its_child_and_crosses_no_box():
    svg = draw(NODES)
    found = boxes(svg)
    right = {(x + WIDTH, y + HEIGHT / 2) for x, y in found.values()}
    left = {(x, y + HEIGHT / 2) for x, y in found.values()}
    lines = arrows(svg)
    assert len(lines) == 5, "the parent that is not there has none"
    for line in lines:
        assert line[0] in right and line[-1] in left
        for x, y in line[1:-1]:
            inside = [t for t, (bx, by) in found.items() if bx < x < bx + WIDTH
                      and by < y < by + HEIGHT]  # fmt: skip
            assert inside == []


def test_names_cannot_break_the_drawing():
    found = boxes(draw({"x": Node('<script>"&', "kind/<b>"), "y": Node("n" * 40, "")}))
    assert '<script>"&' in found and "n" * 21 + "…" in found


def test_nothing_is_a_drawing_too():
    assert ET.fromstring(draw({})).tag == f"{SVG}svg"


def test_long_source_keeps_its_start_and_its_end():
    source = "/mnt/team/projects/chat/2026/demonstrations-v3.jsonl"
    svg = draw({"x": Node("data-sft", "dataset/x", (), source), "y": Node("sft", "model/y", ["x"])})
    assert "/mnt/team/pro…tions-v3.jsonl<" in svg
    assert f"<title>data-sft dataset/x {source}</title>" in svg
