"""Nothing that this project reads can run code: no pickle, no eval, no shell."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ["rlhf_core", "flows", "tasks", "deployments", "docs", "requirements"]
PICKLES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
SAFE_LOADERS = {"_Loader", "SafeLoader", "CSafeLoader", "BaseLoader", "CBaseLoader", "loader"}


def sources() -> Iterator[Path]:
    for room in ROOMS:
        yield from (ROOT / room).rglob("*.py")


def called(node: ast.Call) -> str:
    """Dotted name of what is called; the part after the last call or index where there is one."""
    parts: list[str] = []
    function: ast.expr = node.func
    while isinstance(function, ast.Attribute):
        parts.insert(0, function.attr)
        function = function.value
    return ".".join([function.id, *parts] if isinstance(function, ast.Name) else ["?", *parts])


def keyword(node: ast.Call, name: str) -> str | None:
    return next((ast.unparse(k.value) for k in node.keywords if k.arg == name), None)


def judge_call(node: ast.Call) -> str | None:
    name = called(node)
    last = name.rpartition(".")[2]
    if name in ("eval", "exec", "compile", "__import__"):
        return "runs a text as code"
    if name in ("os.system", "os.popen") or keyword(node, "shell") not in (None, "False"):
        return "runs a shell"
    if last == "load" and name.startswith("torch") and keyword(node, "weights_only") != "True":
        return "torch.load without weights_only=True"
    if name == "torch.save":
        return "writes a pickle"
    if keyword(node, "allow_pickle") not in (None, "False") or last in ("read_pickle", "to_pickle"):
        return "reads a pickle"
    if name in ("yaml.load", "yaml.load_all"):
        given = ast.unparse(node.args[1]) if len(node.args) > 1 else keyword(node, "Loader")
        return None if given in SAFE_LOADERS else "yaml.load without a safe loader"
    if name in ("yaml.unsafe_load", "yaml.full_load"):
        return "builds objects out of YAML"
    if last == "from_pretrained" and keyword(node, "trust_remote_code") == "True":
        return "always runs a model's own code"
    return None


def problems(text: str) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(text)):
        modules: list[str] = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules = [node.module or ""]
        found += [f"imports {m}" for m in modules if m.partition(".")[0] in PICKLES]
        if isinstance(node, ast.Call) and (text_of := judge_call(node)):
            found.append(f"line {node.lineno}: {text_of}")
    return found


@pytest.mark.parametrize("path", sorted(sources()), ids=lambda path: str(path.relative_to(ROOT)))
def test_source_runs_no_code_that_it_reads(path: Path) -> None:
    assert problems(path.read_text()) == []


@pytest.mark.parametrize(
    "text",
    [
        "import pickle", "from pickle import loads", "import joblib", "eval('1')", "exec(x)",
        "torch.load(f)", "torch.load(f, weights_only=False)", "yaml.load(t)", "torch.save(x, f)",
        "yaml.load(t, Loader=yaml.Loader)", "yaml.load(t, Loader)", "yaml.unsafe_load(t)",
        "np.load(f, allow_pickle=True)", "subprocess.run(c, shell=True)", "os.system(c)",
        "pd.read_pickle(f)", "AutoModel.from_pretrained(x, trust_remote_code=True)",
    ],
)  # fmt: skip
def test_what_could_run_code_is_noticed(text: str) -> None:
    assert problems(text)


@pytest.mark.parametrize(
    "text",
    [
        "torch.load(f, weights_only=True)", "yaml.load(t, _Loader)", "yaml.safe_load(t)",
        "np.load(f)", "model.eval()", "re.compile(x)", "subprocess.run(c)", "json.load(f)",
        "AutoModel.from_pretrained(x, trust_remote_code=trust)",
    ],
)  # fmt: skip
def test_what_cannot_run_code_is_left_alone(text: str) -> None:
    assert not problems(text)
