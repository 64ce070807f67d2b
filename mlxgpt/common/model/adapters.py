"""Adapters on the host: which matrices get one, what trains, and what it starts from. Both frameworks build from it.

A matrix W (n_out, n_in) at PATH (``h.0.attn.q_proj``) computes as W + scale B A (Hu et al. 2021, LoRA):

    PATH.lora_a (r, n_in)   PATH.lora_b (n_out, r)       A and B
    PATH.magnitude (n_out,)                              dora: norms of W's rows (Liu et al. 2024); wte: (V,)
    PATH.start_a (r, n_in)  PATH.start_b (n_out, r)      pissa: A and B at the start, frozen; W + scale (B A - B0 A0)

so that the base stays as it is, byte for byte. The embedding wte (V, C) is W^T of such a matrix: lora_a (r, V), lora_b
(C, r); where the head is tied to it, the update acts there too. scale = alpha / r, rslora: alpha / sqrt(r).
What trains whole (adapter.train, biases, a classifier's score, every weight of method full) keeps its name of
params.table. Of an embedding or a head single rows may have trained (PEFT's trainable_token_indices):

    PATH.rows (k, C)   PATH.tokens (k,) int64           these rows take the place of the base's
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mlxgpt.common import rng
from mlxgpt.common.config import AdapterConfig, ModelConfig, Recipe
from mlxgpt.common.errors import UserError
from mlxgpt.common.model import families, params
from mlxgpt.common.model.affine import Quantized
from mlxgpt.common.model.params import Param

KINDS = ("lora_a", "lora_b", "magnitude", "start_a", "start_b")
Weight = np.ndarray | Quantized
_REGEX = re.compile(r"[\\^$*+?{}\[\]|()]")  # what no name of a module has


@dataclass(frozen=True)
class Target:
    """An adapted matrix: its sizes, and the update's rank and scale."""

    n_out: int
    n_in: int
    rank: int
    scale: float


def targets(model: ModelConfig, adapter: AdapterConfig) -> dict[str, Target]:
    """Path -> Target of every matrix that gets an adapter, in the order of params.table; method full has none.

    Raises:
        UserError: a pattern that matches nothing (it lists what exists), or matches what cannot be adapted.
    """
    if adapter.method == "full":
        return {}
    sizes = {
        name.removesuffix(".weight"): param.shape for name, param in params.table(model).items() if param.adaptable
    }
    if adapter.layers > model.n_layer:
        raise UserError(f"adapter.layers = {adapter.layers}: expected at most the model's {model.n_layer}")
    first = model.n_layer - adapter.layers if adapter.layers else 0
    able = [path for path in sizes if not path.startswith("h.") or int(path.split(".")[1]) >= first]
    chosen: set[str] = set()
    for pattern in adapter.targets:
        chosen |= set(find(model, pattern, able, "adapter.targets"))
    ranks = _overrides(model, adapter.ranks, able, "adapter.ranks")
    alphas = _overrides(model, adapter.alphas, able, "adapter.alphas")
    made = {}
    for path in able:
        if path not in chosen:
            continue
        n_out, n_in = sizes[path] if path != "wte" else sizes[path][::-1]
        rank, alpha = int(ranks.get(path, adapter.rank)), alphas.get(path, adapter.alpha)
        if rank > min(n_out, n_in):
            raise UserError(f"adapter.rank = {rank}: expected at most {min(n_out, n_in)}, the smaller side of {path}")
        made[path] = Target(n_out, n_in, rank, alpha / (rank**0.5 if adapter.rslora else rank))
    return made


def find(model: ModelConfig, pattern: str, paths: Iterable[str], where: str) -> list[str]:
    """The paths that a pattern means: ``all-linear`` (every matrix of the blocks), the end of a name, or a regex.

    Names are ours (h.0.attn.c_proj) and those of the family's files (model.layers.0.self_attn.o_proj).

    Raises:
        UserError: it matches none, or is not a regular expression.
    """
    paths = list(paths)
    if pattern == "all-linear":
        return [path for path in paths if path.startswith("h.")]
    foreign = {path: families.to_foreign(model, f"{path}.weight")[0].removesuffix(".weight") for path in paths}
    try:
        expression = re.compile(pattern if _REGEX.search(pattern) else rf"(.*\.)?{re.escape(pattern)}")
    except re.error as error:
        raise UserError(f"{where}: {pattern!r} is not a regular expression: {error}") from None
    found = [path for path in paths if expression.fullmatch(path) or expression.fullmatch(foreign[path])]
    if not found:
        known = dict.fromkeys(re.sub(r".*\.\d+\.", "", name) for name in foreign.values())
        raise UserError(f"{where}: {pattern!r} matches nothing; expected all-linear or some of {', '.join(known)}")
    return found


def _overrides(model: ModelConfig, items: Iterable[str], paths: list[str], where: str) -> dict[str, float]:
    """Path -> value of ``pattern=value`` items."""
    made: dict[str, float] = {}
    for item in items:
        pattern, _, value = item.rpartition("=")
        made |= dict.fromkeys(find(model, pattern, paths, where), float(value))
    return made


def trainable(recipe: Recipe) -> dict[str, Param]:
    """Every tensor that trains, by name: params.table in pre-training and method full, else what the adapter says.

    Raises:
        UserError: see ``targets``; a name of adapter.train that the model does not have; muon, for A and B.
    """
    table, adapter = params.table(recipe.model), recipe.adapter
    if adapter is None or adapter.method == "full":
        return table
    if recipe.optim.name == "muon":  # it makes A and B orthogonal each for itself, which says nothing of B A
        raise UserError(f"optim.name = muon: expected adamw with adapter.method = {adapter.method}")
    found = targets(recipe.model, adapter)
    made: dict[str, Param] = {}
    for path, target in found.items():
        # one of the two starts at 0, so the other's first gradient is 0 by design; not with pissa
        zero_a, zero_b = (adapter.init == "default" and (path == "wte") == turned for turned in (False, True))
        made[f"{path}.lora_a"] = Param((target.rank, target.n_in), zero_grad_at_init=zero_a, decay=True)
        made[f"{path}.lora_b"] = Param(
            (target.n_out, target.rank), zero_grad_at_init=zero_b, decay=True, lr=adapter.b_lr
        )
        if adapter.method == "dora":
            made[f"{path}.magnitude"] = Param((target.n_in if path == "wte" else target.n_out,))
    made |= {name: table[name] for name in whole(recipe.model, adapter, found)}
    return made


def count(recipe: Recipe) -> int:
    """The number of values that train."""
    return sum(int(np.prod(param.shape)) for param in trainable(recipe).values())


def shapes(recipe: Recipe) -> dict[str, tuple[int, ...]]:
    """Every tensor that an engine is given: the model's, the trainable ones of its updates, and PiSSA's starts."""
    made = {name: param.shape for name, param in (params.table(recipe.model) | trainable(recipe)).items()}
    if recipe.adapter is not None and recipe.adapter.init == "pissa":
        for path, target in targets(recipe.model, recipe.adapter).items():
            made |= {f"{path}.start_a": (target.rank, target.n_in), f"{path}.start_b": (target.n_out, target.rank)}
    return made


def whole(model: ModelConfig, adapter: AdapterConfig, found: Mapping[str, Target]) -> list[str]:
    """The names of params.table that train whole beside the adapted matrices ``found``."""
    table = params.table(model)
    modules = list(dict.fromkeys(name.rpartition(".")[0] for name in table))
    picked = {path for pattern in adapter.train for path in find(model, pattern, modules, "adapter.train")}
    picked |= {"score"} if model.labels else set()
    both = sorted(picked & set(found))
    if both:
        raise UserError(f"adapter.train: {both[0]} is adapted as well: expected it in adapter.targets or here")
    made = []
    for name in table:
        path, _, kind = name.rpartition(".")
        biased = kind == "bias" and (adapter.bias == "all" or (adapter.bias == "adapted" and path in found))
        if path in picked or biased:
            made.append(name)
    return made


def init(recipe: Recipe, base: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What the adapter starts from: a function of (seed, name) and, for dora and pissa, of the matrix; float32.

    A from U(-1 / sqrt(n_in), 1 / sqrt(n_in)) and B = 0, as PEFT and mlx-lm; the embedding's A = 0 and B from N(0, 1),
    as PEFT. PiSSA (Meng et al. 2024): of W = U S V^T the largest singular values, A = sqrt(S) V^T and B = U sqrt(S).

    Args:
        recipe: with an adapter.
        base: the model's weights by name, dequantized; only adapted matrices are read.
    """
    assert recipe.adapter is not None
    made: dict[str, np.ndarray] = {}
    for path, target in targets(recipe.model, recipe.adapter).items():
        matrix = base[f"{path}.weight"].T if path == "wte" else base[f"{path}.weight"]
        shape_a, shape_b = (target.rank, target.n_in), (target.n_out, target.rank)
        if recipe.adapter.init == "pissa":
            left, values, right = np.linalg.svd(matrix.astype(np.float64), full_matrices=False)
            root = np.sqrt(values[: target.rank] / target.scale)
            a = (root[:, None] * right[: target.rank]).astype(np.float32)
            b = (left[:, : target.rank] * root).astype(np.float32)
            made |= {f"{path}.start_a": a, f"{path}.start_b": b}
        elif path == "wte":
            a = np.zeros(shape_a, np.float32)
            b = rng.normal(recipe.train.seed, "adapter", f"{path}.lora_b", shape=shape_b, std=1.0)
        else:
            bound = target.n_in**-0.5
            a = rng.uniform(recipe.train.seed, "adapter", f"{path}.lora_a", shape=shape_a, bound=bound)
            b = np.zeros(shape_b, np.float32)
        made |= {f"{path}.lora_a": a, f"{path}.lora_b": b}
        if recipe.adapter.method == "dora":
            rows = base[f"{path}.weight"].astype(np.float64)
            made[f"{path}.magnitude"] = np.linalg.norm(rows, axis=1).astype(np.float32)
    return made


def delta(target: Target, arrays: Mapping[str, np.ndarray], path: str) -> np.ndarray:
    """What an update adds to PATH.weight before dora's norms: scale (B A - B0 A0), float64, in the weight's layout."""
    a, b = (arrays[f"{path}.{kind}"].astype(np.float64) for kind in ("lora_a", "lora_b"))
    made = b @ a
    if f"{path}.start_a" in arrays:
        made -= arrays[f"{path}.start_b"].astype(np.float64) @ arrays[f"{path}.start_a"].astype(np.float64)
    made *= target.scale
    return made.T if path == "wte" else made


def fuse(weight: np.ndarray, target: Target, arrays: Mapping[str, np.ndarray], path: str) -> np.ndarray:
    """The matrix that PATH.weight and its update compute as, float32."""
    return merged(weight, target, arrays, path).astype(np.float32)


def merged(weight: np.ndarray, target: Target, arrays: Mapping[str, np.ndarray], path: str) -> np.ndarray:
    """``fuse`` before it is rounded, float64."""
    made = weight + delta(target, arrays, path)
    if f"{path}.magnitude" in arrays:
        made *= (arrays[f"{path}.magnitude"] / np.linalg.norm(made, axis=1))[:, None]
    return made


def with_rows(weight: Weight, arrays: Mapping[str, np.ndarray], path: str) -> np.ndarray:
    """A copy of PATH.weight whose rows PATH.tokens are PATH.rows; a quantized matrix is dequantized."""
    made = weight.dequantize() if isinstance(weight, Quantized) else weight.copy()
    made[arrays[f"{path}.tokens"]] = arrays[f"{path}.rows"]
    return made


def add_up(
    given: Sequence[tuple[Mapping[str, Target], Mapping[str, np.ndarray], float]],
) -> tuple[dict[str, Target], dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Several adapters (targets, tensors, weight) as one: targets, tensors of updates, and tensors trained whole.

    Updates of one matrix are laid side by side along r, scales and weights folded into B. What trained whole is alone
    with its module, but for an update of the same adapter, which acts on it.

    Raises:
        UserError: dora, or a tensor trained whole, that has a weight or shares what it changes with another.
    """
    made: dict[str, Target] = {}
    arrays: dict[str, np.ndarray] = {}
    whole: dict[str, np.ndarray] = {}
    for each, tensors, weight in given:
        for name, array in tensors.items():
            path, _, kind = name.rpartition(".")
            if kind in KINDS and path in each:
                continue
            if name in whole or weight != 1 or _overlaps(path, kind, [others for others, _, _ in given], each, whole):
                raise UserError(f"adapters: {name} is trained whole: expected it in one of them, without a weight")
            whole[name] = array
    for path in dict.fromkeys(path for each, _, _ in given for path in each):
        parts = [(each[path], tensors, weight) for each, tensors, weight in given if path in each]
        first, tensors, weight = parts[0]
        if len(parts) == 1 and weight == 1:
            made[path] = first
            arrays |= {f"{path}.{kind}": tensors[f"{path}.{kind}"] for kind in KINDS if f"{path}.{kind}" in tensors}
            continue
        lefts, rights = [], []
        for target, tensors, weight in parts:
            if f"{path}.magnitude" in tensors:
                raise UserError(f"adapters: {path} has a dora update: expected it alone and without a weight")
            for sign, a, b in ((1, "lora_a", "lora_b"), (-1, "start_a", "start_b")):
                if f"{path}.{a}" in tensors:
                    rights.append(tensors[f"{path}.{a}"])
                    lefts.append(tensors[f"{path}.{b}"] * np.float32(sign * weight * target.scale))
        arrays[f"{path}.lora_a"], arrays[f"{path}.lora_b"] = np.concatenate(rights), np.concatenate(lefts, axis=1)
        made[path] = Target(first.n_out, first.n_in, len(arrays[f"{path}.lora_a"]), 1.0)
    return made, arrays, whole


def _overlaps(
    path: str,
    kind: str,
    targets: Sequence[Mapping[str, Target]],
    own: Mapping[str, Target],
    whole: Mapping[str, np.ndarray],
) -> bool:
    """Whether another adapter changes the matrix as well that one replaces whole or by rows."""
    if kind not in ("weight", "rows"):
        return False
    adapted = any(path in other for other in targets if other is not own)
    return adapted or f"{path}.{'rows' if kind == 'weight' else 'weight'}" in whole
