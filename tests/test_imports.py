"""Who may import whom: the arrows between the packages, and how little a command loads before it works."""

import ast
import functools
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FRAMEWORKS = {"mlx", "torch"}
FILES = sorted(
    path.relative_to(ROOT) for package in ("mlxgpt", "torch_ref", "convert") for path in ROOT.glob(f"{package}/**/*.py")
)


@functools.cache
def imported(source: str) -> list[str]:
    """Every module that the source imports, also inside functions, in order: ``a.b`` for ``from a import b``."""
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"line {node.lineno}: a relative import"
            names += [(node.lineno, f"{node.module}.{alias.name}") for alias in node.names]
    return [name for _, name in sorted(names)]


def allowed(path: Path, module: str) -> bool:
    """Whether the file may import the module, by its package."""
    root = module.split(".")[0]
    if root not in {"mlxgpt", "torch_ref", "convert", *FRAMEWORKS}:
        return True
    if path.parts[:2] == ("mlxgpt", "common"):
        return module.startswith("mlxgpt.common.") or module == "mlxgpt"
    if path.parts[:2] == ("mlxgpt", "commands"):
        return module.startswith(("mlxgpt.common.", "mlxgpt.cli")) or module == "mlxgpt.__version__"
    if path.parts[0] == "mlxgpt":
        return root in ("mlxgpt", "mlx")
    if module.startswith("mlxgpt.common."):
        return True
    if path.parts[0] == "torch_ref":
        return root in ("torch_ref", "torch") or (path.name == "__main__.py" and module == "mlxgpt.cli.main")
    return root in ("convert", "torch") or module == "mlxgpt"


@pytest.mark.parametrize("path", FILES, ids=str)
def test_imports_follow_the_arrows(path: Path) -> None:
    wrong = [module for module in imported((ROOT / path).read_text()) if not allowed(path, module)]
    assert not wrong


def test_an_import_inside_a_function_is_seen() -> None:
    source = "from mlxgpt.common import rng\ndef f():\n    import torch.nn as nn\n"
    assert imported(source) == ["mlxgpt.common.rng", "torch.nn"]
    assert not allowed(Path("mlxgpt/model.py"), "torch.nn")
    assert not allowed(Path("mlxgpt/common/data/token_source.py"), "mlx.core")
    assert not allowed(Path("mlxgpt/common/data/token_source.py"), "mlxgpt.model")
    assert not allowed(Path("torch_ref/model.py"), "mlxgpt.blas")
    assert not allowed(Path("mlxgpt/commands/train.py"), "mlxgpt.model")


# What mlxgpt/common consists of, and convert, from the bottom up: a place imports from itself and from those before it.
COMMON = (
    "errors", "files", "units", "failures", "rng", "fields", "model_config", "align_config", "config", "keys", "batch",
    "scores", "model", "recipes", "tf32", "backend", "tokenizers", "data", "rows", "folders", "plan", "runs", "tasks",
    "train", "chat", "sft", "inference", "user_code", "align", "evaluate", "doctor", "serve",
)  # fmt: skip
ORDER = {
    "mlxgpt.common": COMMON,
    "mlxgpt.common.serve": ("work", "engine", "models", "guided", "alone", "tools", "api", "page", "web"),
    "convert": ("formats", "adopt", "verify", "conversion", "adoption", "fuse", "adapters", "quantize", "commands"),
    "convert.formats": ("opened", "stream", "", "gguf", "torch_files", "adapter", "registry"),
}


def arrows(sources: dict[str, str]) -> dict[str, set[str]]:
    """Module -> the modules of ``sources`` that it imports, also inside functions."""
    found: dict[str, set[str]] = {}
    for module, source in sources.items():
        names = [name for name in imported(source) if name != module]
        # `from a import b` is the module a.b, or the name b of the module a
        found[module] = {n if n in sources else n.rpartition(".")[0] for n in names} & sources.keys() - {module}
    return found


def circles(arrows: dict[str, set[str]]) -> list[list[str]]:
    """Every way round, once for each module that closes it."""
    found: list[list[str]] = []
    done: set[str] = set()

    def visit(module: str, path: list[str]) -> None:
        if module in path:
            found.append([*path[path.index(module) :], module])
        elif module not in done:
            for other in sorted(arrows[module]):
                visit(other, [*path, module])
            done.add(module)

    for module in sorted(arrows):
        visit(module, [])
    return found


def upward(arrows: dict[str, set[str]], package: str, order: tuple[str, ...]) -> list[str]:
    """Imports inside ``package`` from a place to a later one; a place that is not named stands where "" does."""

    def rank(module: str) -> int:
        place = module.removeprefix(f"{package}.").split(".")[0]
        assert place in order or "" in order, f"{package}.{place} has no place in ORDER"
        return order.index(place if place in order else "")

    inside = {module for module in arrows if module.startswith(f"{package}.")}
    return [f"{one} imports {two}" for one in inside for two in arrows[one] & inside if rank(two) > rank(one)]


SOURCES = {
    ".".join(path.with_suffix("").parts): (ROOT / path).read_text() for path in FILES if path.name != "__init__.py"
}


def test_no_circles() -> None:
    assert circles(arrows(SOURCES)) == []


@pytest.mark.parametrize("package", ORDER)
def test_lower_packages_do_not_import_higher_ones(package: str) -> None:
    assert upward(arrows(SOURCES), package, ORDER[package]) == []


def test_an_import_upward_and_a_circle_are_seen() -> None:
    more = "def f():\n    from mlxgpt.common.train import loop\n"
    broken = arrows(SOURCES | {"mlxgpt.common.runs.metrics": SOURCES["mlxgpt.common.runs.metrics"] + more})
    assert "mlxgpt.common.runs.metrics imports mlxgpt.common.train.loop" in upward(broken, "mlxgpt.common", COMMON)
    assert any("mlxgpt.common.runs.metrics" in one and "mlxgpt.common.train.loop" in one for one in circles(broken))


@pytest.mark.parametrize("path", sorted(ROOT.glob("mlxgpt/*.py")), ids=lambda path: path.name)
def test_the_blas_comes_before_mlx(path: Path) -> None:
    modules = imported(path.read_text())
    first = next((i for i, module in enumerate(modules) if module.split(".")[0] == "mlx"), len(modules))
    assert first == len(modules) or "mlxgpt.blas" in modules[:first]


@pytest.mark.parametrize(("package", "other"), [("mlxgpt", "torch"), ("torch_ref", "mlx")])
def test_a_package_imports_without_the_other_framework(package: str, other: str) -> None:
    modules = [
        ".".join(path.with_suffix("").parts)
        for path in FILES
        if path.stem not in ("__init__", "__main__", "lm_eval")  # lm-evaluation-harness is an extra
        and (path.parts[0] == package or path.parts[:2] in (("mlxgpt", "common"), ("mlxgpt", "commands")))
    ]
    code = f"import importlib, sys; sys.modules[{other!r}] = None\nfor name in {modules}: importlib.import_module(name)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_help_needs_the_standard_library_alone() -> None:
    """Without site-packages (-S), so that neither a framework nor numpy nor rich can have been imported."""
    code = """
import sys
import mlxgpt
light = {name for name in sys.modules if name.split(".")[0] == "mlxgpt"}
assert light == {"mlxgpt"}, light
from mlxgpt import cli
assert cli.main(["--help"]) == 0
assert "mlxgpt.common.config" not in sys.modules
for name in cli.VERBS:
    try:
        cli.main([*name.split(), "--help"])
    except SystemExit as exit:
        assert exit.code == 0
"""
    run = subprocess.run([sys.executable, "-S", "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    assert run.stdout.count("usage: mlxgpt") > 5
    assert run.stderr == ""
