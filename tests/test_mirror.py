"""mlxgpt/X.py and torch_ref/X.py are one file in two languages: the same names in the same order, few other lines.

ONLY and SHARE are ratchets: lowering one is free, raising one needs a reason in review.
"""

import ast
import difflib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ALONE = {
    *("__init__.py", "__main__.py", "cli.py", "verbs.py", "blas.py"),
    "lm_eval.py",  # lm-evaluation-harness's command, for both
    "fused.py",  # one kernel for many tensors, which MLX's compiler makes by itself
    "stacks.py",  # and of few tensors, if they are stacked
    "fast.py",  # what each framework's own kernels lack
    "sampled.py",  # MLX counts its peak by itself
    "transfer.py",  # MLX's arrays are where the host can read them
}

# names that one framework needs and the other has no counterpart of
ONLY = {
    "adapters.py": {"low_rank.run", "low_rank.run_vjp"},
    "footprint.py": {"divided", "measure.run"},  # PyTorch's path does not depend on sizes
    "engine.py": {"Engine._settle", "Engine._show", "Engine._step", "Engine._weights"},
    "head.py": {
        "Losses",
        "Losses.forward",
        "Losses.backward",
        "after",
        "token_losses.run",
        "token_losses.run_vjp",
    },
    "judge.py": {"judge.parts"},
    "batching.py": {"Batch._index"},  # a tensor names its device
    "model.py": {"Model.device"},
    "layers.py": {"Embedding.__init__", "gather", "_gather_vjp"},
    "sample.py": {  # torch has hooks
        "Library.gradients.mean",
        "Library.watch.watching",
        "Library.watch.watching.Watching",
        "Library.watch.watching.Watching.forward",
    },
    "quant.py": {
        "Product",
        "Product.backward",
        "Product.forward",
        "QuantizedEmbedding.__init__",
        "product",
        "product.times",
        "product.times_vjp",
    },
}

# the largest share of lines that may differ
SHARE = {
    "adapters.py": 0.34,
    "affine.py": 0.63,  # MLX's own format: PyTorch has to know its rules
    "attention.py": 0.34,  # MLX has an attention of few scores
    "api.py": 0.13,
    "batching.py": 0.33,
    "calibrate.py": 0.24,
    "cache.py": 0.15,
    "device.py": 0.66,  # each names its own memory limits
    "doctor.py": 0.50,
    "footprint.py": 0.70,  # each counts bytes in its own way
    "engine.py": 0.48,  # MLX stacks weights on a GPU; PyTorch has kernels for many tensors
    "generate.py": 0.28,
    "head.py": 0.32,  # MLX without a scatter, where train.deterministic asks
    "inputs.py": 0.62,  # each knows where a look at values makes a device wait
    "judge.py": 0.61,  # two libraries, each with an interface of its own; a border of transformers alone
    "layers.py": 0.29,
    "load.py": 0.18,
    "losses.py": 0.36,  # torch.compile takes the sizes of a batch as variables
    "model.py": 0.22,  # on a GPU MLX has no fused attention with a gradient: tiles; PyTorch has FlexAttention
    "noise.py": 0.29,
    "optim.py": 0.34,  # MLX updates nothing in place; Muon on a stack
    "policy.py": 0.30,
    "preference.py": 0.18,
    "probe.py": 0.37,
    "quant.py": 0.39,
    "sample.py": 0.37,
    "scoring.py": 0.30,
    "rope.py": 0.45,  # a few lines, half of them indexing
    "trial.py": 0.40,  # short, so that imports weigh; float64 is PyTorch's alone
}


def names(package: str) -> set[str]:
    """The files of a package that must have a twin."""
    return {path.name for path in (ROOT / package).glob("*.py")} - ALONE


def outline(path: Path) -> list[str]:
    """Every class, function and method in order, qualified; __call__ counts as forward."""

    def visit(node: ast.AST, prefix: str) -> list[str]:
        found = []
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef | ast.FunctionDef):
                name = prefix + ("forward" if child.name == "__call__" else child.name)
                found += [name, *visit(child, f"{name}.")]
            else:
                found += visit(child, prefix)
        return found

    return visit(ast.parse(path.read_text()), "")


def share_of_differing_lines(a: list[str], b: list[str]) -> float:
    """Lines of either file that the other lacks at that place, of all lines of both."""
    matcher = difflib.SequenceMatcher(None, a, b, autojunk=False)
    return 1 - 2 * sum(block.size for block in matcher.get_matching_blocks()) / (len(a) + len(b))


def test_every_file_has_its_twin() -> None:
    assert names("mlxgpt") == names("torch_ref") == set(SHARE)


@pytest.mark.parametrize("name", sorted(SHARE))
def test_twins_define_the_same_names_in_the_same_order(name: str) -> None:
    ours, theirs = (outline(ROOT / package / name) for package in ("mlxgpt", "torch_ref"))
    assert set(ours) ^ set(theirs) == ONLY.get(name, set())
    assert [one for one in ours if one in theirs] == [one for one in theirs if one in ours]


@pytest.mark.parametrize("name", sorted(SHARE))
def test_twins_differ_in_few_lines(name: str) -> None:
    a, b = ((ROOT / package / name).read_text().splitlines() for package in ("mlxgpt", "torch_ref"))
    assert share_of_differing_lines(a, b) <= SHARE[name]


def test_a_changed_line_counts_once_in_each_file() -> None:
    assert share_of_differing_lines(["a", "b", "c", "d"], ["a", "x", "c", "d"]) == 0.25
