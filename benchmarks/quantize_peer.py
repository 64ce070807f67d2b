"""One of mlx_lm's ways to quantize, in a process of its own, on the windows that `mlxgpt quantize` calibrates on.

python -m benchmarks.quantize_peer METHOD MADE BITS TEXT FOLDER
"""

import copy
import sys
import time
from pathlib import Path

import numpy as np

from mlxgpt import blas  # noqa: F401  (the same BLAS, before MLX)

# isort: split
import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optimizers
from mlx_lm.quant import awq, dwq, dynamic_quant, gptq
from mlx_lm.utils import load, quantize_model, save

from benchmarks.quantize import CALIBRATION, GROUP, WINDOW, windows


def main(method: str, made: str, bits: str, text: str, folder: str) -> None:
    """Quantizes a folder; ``bits`` of dynamic_quant are those per weight."""
    mx.set_default_device(mx.Device(mx.cpu))
    mx.random.seed(123)
    np.random.seed(123)
    rows = windows(Path(folder), Path(text))[:CALIBRATION]
    model, tokenizer, config = load(folder, return_config=True)  # type: ignore[misc]
    data, count = mx.array(rows[:, :-1]), int(float(bits))
    if method == "convert":
        model, config = quantize_model(model, config, GROUP, count)
    elif method == "gptq":
        model, config["quantization"] = gptq.gptq_quantize(model, data, count, GROUP, count, GROUP)
    elif method == "awq":
        kind = awq.AWQ_MODEL_CONFIGS[config["model_type"]]
        awq.awq_quantize(model, data, kind, GROUP, count, GROUP, count)
        config = awq.update_config(model, config)
    elif method.startswith("dwq"):
        whole, rate = copy.deepcopy(model), float(method.partition("-")[2] or 1e-6)
        model, config = quantize_model(model, config, GROUP, count)
        parts = [(row.tolist(), 0) for row in rows]
        dwq.dwq_quantize(
            model, lambda batch, n, split: whole(batch), optimizers.Adam(rate, bias_correction=True),
            parts, parts[:8], 4, WINDOW + 1, 123, dtype=mx.float32,
        )  # fmt: skip
    else:
        low, high = 3 if float(bits) < 5 else 4, 5 if float(bits) < 5 else 8
        sizes = (low, GROUP, high, GROUP)
        found = dict(dynamic_quant.estimate_sensitivities(model, data, *sizes))
        edge = dynamic_quant.estimate_threshold(model, found, float(bits), *sizes)

        def predicate(path: str, module: nn.Module) -> bool | dict[str, int]:
            if not hasattr(module, "to_quantized"):
                return False
            return {"bits": high, "group_size": GROUP} if found[path] > edge else True

        model, config = quantize_model(model, config, GROUP, low, quant_predicate=predicate)
    save(made, folder, model, tokenizer, config)


if __name__ == "__main__":
    begun = time.process_time()
    main(*sys.argv[1:])
    print(time.process_time() - begun)
