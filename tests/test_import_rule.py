"""Imports point one way, and what an orchestrator loads reaches no torch.

Read from the source, imports inside functions included. The order is that of docs/architecture.md.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Each room imports only rooms of later lines; rooms of one line do not import each other.
FLOORS = [
    {"flows"},
    {"tasks"},
    {"preflight", "algorithms"},
    {"evaluation", "stages"},
    {"training"},
    {"playground", "serving"},
    {"rollout"},
    {"runtime", "models", "chat", "environments"},
    {"model_files", "rewards"},
    {"data"},
    {"store", "pipeline", "judges", "nn"},
    {"losses", "jobs", "system", "errors"},
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}

TORCH = {"torch", "transformers", "colossalai", "peft", "accelerate"}
TORCH_FREE = {
    "flows", "tasks", "preflight", "environments", "model_files", "rewards", "data", "store",
    "pipeline",
    "judges", "jobs", "system", "errors",
}  # fmt: skip
# Loads a tokenizer, which is transformers without torch.
MAY_IMPORT_TRANSFORMERS = {"rlhf_core.data.encoding.tokenizer"}


class Import(NamedTuple):
    """One import statement of one name."""

    line: int
    name: str
    loads: bool  # when the module itself is imported; False: inside a function


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def modules() -> dict[str, Path]:
    found = [path for top in ("flows", "tasks", "rlhf_core") for path in (ROOT / top).rglob("*.py")]
    return {module_name(path): path for path in found}


def room_of(module: str) -> str:
    top, *rest = module.split(".")
    return rest[0] if top == "rlhf_core" and rest else top


def read_imports(node: ast.AST, loads: bool = True) -> Iterator[Import]:
    """All imports below a node, but for those that only a type checker reads when loading."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (Import(child.lineno, alias.name, loads) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0 and child.module is not None, "imports are absolute"
            for alias in child.names:
                yield Import(child.lineno, f"{child.module}.{alias.name}", loads)
        else:
            inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            typing = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
            yield from read_imports(child, loads and not inside and not typing)


@cache
def imports() -> dict[str, list[Import]]:
    return {
        name: list(read_imports(ast.parse(path.read_text()))) for name, path in modules().items()
    }


def target(name: str) -> str | None:
    """The project's module that an imported name is in, or None for other packages."""
    while name:
        if name in modules():
            return name
        name = name.rpartition(".")[0]
    return None


def arrows() -> Iterator[tuple[str, Import, str]]:
    for module, found in imports().items():
        for one in found:
            if (to := target(one.name)) is not None and to != module:
                yield module, one, to


def test_every_room_has_its_floor() -> None:
    rooms = {room_of(module) for module in modules()} - {"rlhf_core", "__main__"}
    assert rooms == set(FLOOR)


def test_rooms_import_only_what_stands_below_them() -> None:
    up = [
        f"{module}:{one.line} ({room_of(module)}) imports {to} ({room_of(to)})"
        for module, one, to in arrows()
        if room_of(module) in FLOOR and room_of(to) in FLOOR and room_of(module) != room_of(to)
        if FLOOR[room_of(module)] >= FLOOR[room_of(to)]
    ]
    assert up == []


def test_no_modules_import_each_other_in_a_circle() -> None:
    left: dict[str, set[str]] = {module: set() for module in modules()}
    for module, _, to in arrows():
        if not module.startswith(f"{to}."):  # a package's face may be used by its own modules
            left[module].add(to)
    while done := [module for module, to in left.items() if not to & set(left)]:
        for module in done:
            del left[module]
    assert sorted(left) == []


def test_algorithms_do_not_import_each_other() -> None:
    each_other = [(a, b) for a, _, b in arrows() if room_of(a) == room_of(b) == "algorithms"]
    assert each_other == []


def test_loading_a_torch_free_room_loads_no_torch() -> None:
    heavy = {
        module
        for module, found in imports().items()
        if any(one.loads and one.name.split(".")[0] in TORCH for one in found)
    }
    reach = dict.fromkeys(heavy, "itself")
    while True:
        new = {a: b for a, one, b in arrows() if one.loads and b in reach and a not in reach}
        if not new:
            break
        reach |= new
    assert {module: via for module, via in reach.items() if room_of(module) in TORCH_FREE} == {}


def test_no_function_of_a_torch_free_room_imports_torch() -> None:
    found = [
        f"{module}:{one.line} imports {one.name}"
        for module, names in imports().items()
        if room_of(module) in TORCH_FREE and module not in MAY_IMPORT_TRANSFORMERS
        for one in names
        if one.name.split(".")[0] in TORCH
    ]
    assert found == []


def test_only_orchestrating_rooms_import_prefect() -> None:
    found = [
        f"{module}:{one.line}"
        for module, names in imports().items()
        if room_of(module) not in ("flows", "tasks")
        for one in names
        if one.name.split(".")[0] == "prefect"
    ]
    assert found == []


@pytest.mark.parametrize("room", sorted(TORCH_FREE - {"errors"}))
def test_rooms_that_the_orchestrator_reads_have_an_empty_or_small_face(room: str) -> None:
    folder = ROOT / (room if room in ("flows", "tasks") else f"rlhf_core/{room}")
    faces = {"jobs": 220, "store": 10, "rewards": 10, "tasks": 10}  # lines; the others are empty
    assert len((folder / "__init__.py").read_text().splitlines()) <= faces.get(room, 0)


def test_private_names_stay_in_their_module() -> None:
    taken = [
        f"{module}:{one.line} imports {one.name}"
        for module, one, _ in arrows()
        if (name := one.name.rpartition(".")[2]).startswith("_") and not name.startswith("__")
    ]
    assert taken == []


def test_every_job_names_a_module_that_runs_it() -> None:
    from typing import get_args

    from rlhf_core.jobs import Job

    for job in get_args(Job):
        tree = ast.parse(modules()[job.module].read_text())
        assert "run" in {n.name for n in tree.body if isinstance(n, ast.FunctionDef)}, job.module
