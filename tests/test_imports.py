"""Who may import whom: the arrows between the packages, and how little a command loads before it works."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FRAMEWORKS = {"mlx", "torch"}
FILES = sorted(
    path.relative_to(ROOT) for package in ("mlxgpt", "torch_ref", "convert") for path in ROOT.glob(f"{package}/**/*.py")
)


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
        if path.stem not in ("__init__", "__main__")
        and (path.parts[0] == package or path.parts[:2] == ("mlxgpt", "common"))
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
