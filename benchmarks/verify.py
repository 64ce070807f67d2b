"""`mlxgpt verify`, whole commands, beside the script that one would write: load both models, compare, print.

    python -m benchmarks.verify [--rounds 5] [--layers 12] [--json]

A llama of width 512 with 32,000 vocabulary entries as a Hugging Face folder, against its copy in mlx-lm's form. The
script of the first row compares the files' tensors. That of the second runs the one in transformers and the other in
mlx-lm on 128 tokens and compares logits; ours does so in both frameworks at normal and at eightfold weights, and
compares tensors and config too.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.pairs import commands
from benchmarks.report import Row, finish

WRITE = """
import sys
from benchmarks import decode
from pathlib import Path
decode.SIZES["n_layer"] = int(sys.argv[1])
decode.write_folder(Path(sys.argv[2]))
"""
TENSORS = """
import sys
import numpy as np
from safetensors import safe_open
files = [safe_open(f"{folder}/model.safetensors", "np") for folder in sys.argv[1:]]
assert sorted(files[0].keys()) == sorted(files[1].keys())
for name in files[0].keys():
    assert np.array_equal(files[0].get_tensor(name), files[1].get_tensor(name)), name
"""
LOGITS = """
import sys
from pathlib import Path
from mlxgpt import blas  # the same BLAS, before MLX
import mlx.core as mx
import numpy as np
import torch
from mlx_lm.utils import load_model
from transformers import AutoModelForCausalLM
tokens = [7919 * i % 32000 for i in range(1, 129)]
with torch.no_grad():
    left = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)(torch.tensor([tokens])).logits.numpy()
mx.set_default_device(mx.Device(mx.cpu))
right = np.array(load_model(Path(sys.argv[2]))[0](mx.array([tokens])))
assert np.abs(left - right).max() <= 1e-4 * np.abs(left).max()
"""


def measure(rounds: int, layers: int) -> list[Row]:
    """Files alone, then with both frameworks."""
    with tempfile.TemporaryDirectory() as place:
        a, b = f"{place}/a", f"{place}/b"
        # in processes of their own: a child's peak is at least its parent's
        subprocess.run([sys.executable, "-c", WRITE, str(layers), a], check=True)
        command = [sys.executable, "-m", "mlxgpt"]
        subprocess.run([*command, "convert", a, b, "--to", "mlx-lm"], check=True, stdout=subprocess.DEVNULL)
        size = (Path(a) / "model.safetensors").stat().st_size / 1e6
        return [
            commands(
                f"verify --weights-only, {size:,.0f} MB", "numpy's array_equal on safetensors",
                [*command, "verify", a, b, "--weights-only"], [sys.executable, "-c", TENSORS, a, b], rounds,
            ),
            commands(
                f"verify with logits, {size:,.0f} MB", "logits by transformers and mlx-lm",
                [*command, "verify", a, b, "--rungs", "tensors,config,logits"],
                [sys.executable, "-c", LOGITS, a, b], rounds,
            ),
        ]  # fmt: skip


def main() -> None:
    """Prints the table, or with --json the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    finish(measure(args.rounds, args.layers), args.json)


if __name__ == "__main__":
    main()
