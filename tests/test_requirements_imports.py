"""What the code imports is what its requirement files hold: run.txt alone for the orchestrator."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from functools import cache
from importlib import metadata
from pathlib import Path

import pytest

from tests.test_requirements import ORCHESTRATOR, ROOT, TRAINER, canonical, pins

OWN = ("flows", "tasks", "deployments", "rlhf_core")
# Extras, each imported where a setting or a command asks for it, with an error that says so.
EXTRAS = {
    "kubernetes", "lm_eval", "mlflow", "openlineage", "reasoning_gym", "uvloop", "vllm", "wandb",
}  # fmt: skip
PAGES = {"gradio"}
# Reached from flows, but only imported where a model answers: chat, playground, serve.
ELSEWHERE = {"torch"}


@cache
def sources() -> dict[str, Path]:
    """Module -> file."""
    found = {}
    for path in (path for name in OWN for path in (ROOT / name).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def statements(node: ast.AST, top: bool = True) -> Iterator[tuple[str, bool]]:
    """(dotted name, stands at the module's top) of each import; those for types alone are none."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        if isinstance(child, ast.Import):
            yield from ((alias.name, top) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0 and child.module, "imports are absolute here"
            yield from ((f"{child.module}.{alias.name}", top) for alias in child.names)
        function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        yield from statements(child, top and not function)


@cache
def imports(module: str) -> tuple[frozenset[tuple[str, bool]], frozenset[tuple[str, bool]]]:
    """Modules of the project, and top-level names of others, each with whether at the top."""
    own: set[tuple[str, bool]] = set()
    others: set[tuple[str, bool]] = set()
    for name, top in statements(ast.parse(sources()[module].read_text())):
        first = name.partition(".")[0]
        if first in OWN:
            parts = name.split(".")
            packages = (".".join(parts[:length]) for length in range(1, len(parts) + 1))
            own |= {(package, top) for package in packages if package in sources()}
        elif first not in sys.stdlib_module_names:
            others.add((first, top))
    return frozenset(own), frozenset(others)


@cache
def needs_torch() -> frozenset[str]:
    """Modules whose import imports torch."""
    bound: set[str] = set()
    while True:
        more = {
            module
            for module in set(sources()) - bound
            if ("torch", True) in imports(module)[1]
            or any(top and name in bound for name, top in imports(module)[0])
        }
        if not more:
            return frozenset(bound)
        bound |= more


def reached() -> set[str]:
    """What flows and tasks import, also in functions, up to the first module that needs torch."""
    found = {module for module in sources() if not module.startswith("rlhf_core")}
    front = found
    while front:
        names = {name for module in front for name, _ in imports(module)[0]}
        front = names - found - needs_torch()
        found = found | front
    return found


def named(modules: set[str]) -> set[str]:
    """Top-level names of other projects that these modules import."""
    return {name for module in modules for name, _ in imports(module)[1]}


def missing(names: set[str], uses: tuple[str, ...]) -> set[str]:
    """Names that no package of these requirement files has."""
    homes = metadata.packages_distributions()
    return {
        name for name in names if not {canonical(d) for d in homes.get(name, [])} & set(pins(*uses))
    }


def test_flows_and_tasks_reach_what_is_known_to_be_free_of_torch() -> None:
    free = reached()
    assert not needs_torch() & {
        module for module in sources() if not module.startswith("rlhf_core")
    }
    assert any("preflight" in module for module in free)
    assert any("store" in module for module in free)
    assert {"torch", "prefect", "pyarrow", "matplotlib"} <= named(free)


def test_run_time_file_has_all_that_flows_and_tasks_reach() -> None:
    left = missing(named(reached()), ORCHESTRATOR)
    assert "torch" in left
    assert left <= ELSEWHERE | PAGES | EXTRAS


def test_trainers_files_have_all_that_any_module_imports() -> None:
    assert missing(named(set(sources())), TRAINER) == {"torch"} | PAGES | EXTRAS
    assert missing(PAGES, (*TRAINER, "pages")) == set()


@pytest.mark.parametrize("use", ["run", "train"])
def test_everything_that_a_use_asks_for_is_imported_or_has_a_reason(use: str) -> None:
    from tests.test_requirements import modules, read_requirements

    # Prefect's server, colossalai's Booster, transformers' LoRA and loading import these.
    indirect = {"fastapi", "fsspec", "chatterbot-corpus"} | {
        "accelerate", "bitsandbytes", "einops", "galore-torch", "sentencepiece",
    }  # fmt: skip
    code = named(set(sources()))
    asked = set(read_requirements(f"{use}.in")) - indirect
    assert [name for name in asked if not set(modules().get(name, [])) & code] == []
