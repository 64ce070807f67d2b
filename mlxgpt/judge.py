"""mlx-lm as the judge of a folder; see common/inference/judge.py."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlxgpt import blas  # noqa: F401  (a BLAS must be loaded before MLX)

# isort: split
import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from mlxgpt.common.config import ModelConfig
from mlxgpt.common.folders import mlx_lm_names
from mlxgpt.common.inference import judge as judging
from mlxgpt.common.inference import probe
from mlxgpt.common.inference.judge import Arrays
from mlxgpt.common.inference.probe import KEPT, Request
from mlxgpt.common.model import params


def judge(place: Path, config: ModelConfig, request: Request, probes: Sequence[str]) -> Arrays:
    """mlx_lm's own model in float32 on the CPU; quantized matrices stay so, with float32 scales."""
    from mlx_lm.models.cache import make_prompt_cache
    from mlx_lm.utils import load_model

    mx.set_default_device(mx.Device(mx.cpu))
    model: Any = load_model(place)[0]
    model.set_dtype(mx.float32)
    theirs = {ours: name for name, ours in mlx_lm_names.names(config).items() if ours in params.table(config)}
    weights = dict(tree_flatten(model.parameters()))

    def parts(ours: str) -> list[str]:
        """What a matrix is a linear function of: itself, or its scales and biases."""
        module = theirs[ours].removesuffix(".weight")
        return [f"{module}.scales", f"{module}.biases"] if f"{module}.scales" in weights else [theirs[ours]]

    def forward(scale: float, before: float) -> Arrays:
        now = dict(tree_flatten(model.parameters()))
        grown = probe.growth(config, scale, before)
        model.update(
            tree_unflatten([(name, now[name] * grown[ours]) for ours in grown for name in parts(ours) if name in now])
        )
        yield "logits", np.array(model(mx.array(request.batch[0]))[0, -KEPT:].astype(mx.float32))

    def step(ids: list[int], cache: Any) -> tuple[np.ndarray, Any]:
        return np.array(model(mx.array([ids]), cache=cache)[0, -1].astype(mx.float32)), cache

    plain = {ours: name for ours, name in theirs.items() if name in weights and parts(ours) == [name]}
    digests = {ours: judging.digest(np.array(weights[name])) for ours, name in plain.items()}
    yield "report", judging.report({}, digests, None)
    yield from judging.answers(config, request, forward, step, make_prompt_cache(model))


if __name__ == "__main__":
    sys.exit(judging.main(judge, sys.argv[1:]))
