"""A reference library run on a folder; its results are written as the .npz of the verb ``probe``.

``python -m mlxgpt.judge`` asks mlx-lm, ``python -m torch_ref.judge`` asks transformers; ``verify`` starts them, each in
a process of its own. Beside probing's arrays there is ``report``, a JSON text: what the library said of the tensors,
their sha256 as float32 by our names, and the ids of texts in its tokenizer.
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mlxgpt.common.config import ModelConfig
from mlxgpt.common.errors import UserError
from mlxgpt.common.files import read_json
from mlxgpt.common.inference import probe
from mlxgpt.common.inference.probe import Request
from mlxgpt.common.recipes import build

Arrays = Iterator[tuple[str, np.ndarray]]
Forward = Callable[[float, float], Arrays]
"""(scale, the scale before) -> ``logits``, ``hidden.PLACE`` and ``gradient.NAME``, as far as the library gives them."""
Step = Callable[[list[int], Any], tuple[np.ndarray, Any]]
"""(ids, cache) -> the last token's logits (V,), and the cache that also holds the ids."""


def digest(array: np.ndarray) -> str:
    """sha256 of the values as float32, in our layout."""
    return hashlib.sha256(np.ascontiguousarray(array, dtype=np.float32).data).hexdigest()


def report(said: dict[str, list[str]], digests: dict[str, str], ids: list[list[int]] | None) -> np.ndarray:
    """What is no array of probing's, as one text."""
    return np.array(json.dumps({"said": said, "sha256": digests, "ids": ids}))


def answers(config: ModelConfig, request: Request, forward: Forward, step: Step, cache: Any) -> Arrays:
    """Every scale, then back to the first for what follows the prompt."""
    before = 1.0
    for scale in request.scales:
        for name, array in forward(scale, before):
            kind, _, rest = name.partition(".")
            yield ".".join(filter(None, (kind, probe.spell(scale), rest))), array
        before = scale
    if request.greedy:
        list(forward(1.0, before))
        ids, drawn, rows = request.ids[: request.prompt].tolist(), [], []
        for _ in range(min(request.greedy, config.block_size - len(ids) + 1)):
            row, cache = step(ids, cache)
            rows.append(row)
            drawn.append(int(row.argmax()))
            ids = drawn[-1:]
        yield "greedy.tokens", np.array(drawn, np.int32)
        yield "greedy.margins", probe.margins(np.stack(rows))


def main(judge: Callable[[Path, ModelConfig, Request, Sequence[str]], Arrays], argv: list[str]) -> int:
    """Writes --out. Exit code 2 and one line where the library cannot load or run the folder."""
    parser = argparse.ArgumentParser(prog=judge.__module__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", type=Path, required=True, help="the fields of its ModelConfig, a JSON object")
    parser.add_argument("--tokens", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--probes", type=Path, required=True, help="texts for the tokenizer, a JSON list")
    parser.add_argument("--greedy", type=int, default=0)
    parser.add_argument("--prompt", type=int, default=1)
    parser.add_argument("--no-gradients", dest="gradients", action="store_false")
    parser.set_defaults(scale=None)
    args = parser.parse_args(argv)
    try:
        config = build({"model": read_json(args.model)}, str(args.model)).model
        request = probe.request_of(vars(args))
        request.check(config, str(args.folder))
        probe.write_arrays(args.out, judge(args.folder, config, request, json.loads(args.probes.read_text())))
    except Exception as error:  # whatever a library raises about a folder is what it has to say of it
        text = " ".join(f"{error if isinstance(error, UserError) else repr(error)}".split())
        print(text[:500], file=sys.stderr)
        return 2
    return 0
