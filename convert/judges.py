"""transformers and mlx-lm as judges: what they make of a folder, as the .npz that ``probe`` writes.

    python -m convert.judges transformers|mlx-lm DIR --tokens FILE --out FILE [--greedy N --prompt N --no-gradients]

Runs in a process of its own, where ``verify`` starts it: no other file of this package imports a framework. Beside
probing's arrays there is ``report``, a JSON text: what the library said of the tensors, their sha256 as float32 by our
names, and the ids of the tokenizer's probe set.
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mlxgpt.common import families, params, probing
from mlxgpt.common.config import ModelConfig
from mlxgpt.common.errors import UserError
from mlxgpt.common.probing import KEPT, Request

Arrays = Iterator[tuple[str, np.ndarray]]


def digest(array: np.ndarray) -> str:
    """sha256 of the values as float32, in our layout."""
    return hashlib.sha256(np.ascontiguousarray(array, dtype=np.float32).data).hexdigest()


def transformers_judge(place: Path, config: ModelConfig, request: Request, probes: list[str]) -> Arrays:
    """AutoModelForCausalLM in float32 on the CPU."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    load: Any = transformers.AutoModelForCausalLM.from_pretrained
    model, info = load(place, dtype=torch.float32, output_loading_info=True, local_files_only=True)
    model.eval()
    ours, table, weights = families.from_foreign(config), params.table(config), {}
    for foreign, value in model.named_parameters():
        name = str(families.strip(config, foreign))
        if name in ours and ours[name][0] in table:
            weights[ours[name][0]] = (value, ours[name][1])
    tokens, targets = (torch.from_numpy(array).long() for array in request.batch)

    def forward(scale: float, before: float) -> Arrays:
        with torch.no_grad():
            for name, factor in probing.growth(config, scale, before).items():
                if name in weights:
                    weights[name][0].mul_(factor)
        model.zero_grad()
        answer = model(tokens, output_hidden_states=True)
        states = answer.hidden_states
        yield "logits", answer.logits[0, -KEPT:].detach().float().numpy()
        spelled = ["embed", *(f"h.{n}" for n in range(config.n_layer - 1)), "ln_f"]  # its last state is after the norm
        for name, state in zip(spelled, states, strict=True):
            yield f"hidden.{name}", state[0, -KEPT:].detach().float().numpy()
        if request.gradients:
            torch.nn.functional.cross_entropy(answer.logits.flatten(0, 1).float(), targets.flatten()).backward()
            for name, (value, transposed) in weights.items():
                if value.grad is not None:
                    yield f"gradient.{name}", (value.grad.T if transposed else value.grad).numpy()

    @torch.no_grad()
    def step(ids: list[int], cache: Any) -> tuple[np.ndarray, Any]:
        answer = model(torch.tensor([ids]), past_key_values=cache, use_cache=True)
        return answer.logits[0, -1].float().numpy(), answer.past_key_values

    said = {kind: sorted(map(str, names)) for kind, names in info.items() if names}
    digests = {
        name: digest((value.T if transposed else value).detach().numpy())
        for name, (value, transposed) in weights.items()
    }
    yield "report", _report(said, digests, _ids(place, probes))
    yield from _run(config, request, forward, step, None)


def _ids(place: Path, probes: list[str]) -> list[list[int]] | None:
    """The probe set in transformers' tokenizer; None where the folder has none."""
    from transformers import AutoTokenizer

    from mlxgpt.common.tokenizer import has_tokenizer

    if not has_tokenizer(place) or not probes:
        return None
    load: Any = AutoTokenizer.from_pretrained
    tokenizer = load(place, local_files_only=True)
    return [tokenizer.encode(text, add_special_tokens=False) for text in probes]


def mlx_lm_judge(place: Path, config: ModelConfig, request: Request, probes: list[str]) -> Arrays:
    """mlx_lm's own model in float32 on the CPU; quantised matrices stay so, with float32 scales."""
    from mlxgpt import blas  # noqa: F401  (a BLAS must be loaded before MLX)

    # isort: split
    import mlx.core as mx
    from mlx.utils import tree_flatten, tree_unflatten
    from mlx_lm.models.cache import make_prompt_cache
    from mlx_lm.utils import load_model

    from convert import mlx_lm

    mx.set_default_device(mx.Device(mx.cpu))
    model: Any = load_model(place)[0]
    model.set_dtype(mx.float32)
    names = mlx_lm.names(config)
    kept = params.table(config)
    modules = {ours: name.removesuffix(".weight") for name, ours in names.items() if ours in kept}
    weights = dict(tree_flatten(model.parameters()))

    def parts(ours: str) -> list[str]:
        """What a matrix is a linear function of: itself, or its scales and biases."""
        module = modules[ours]
        return [f"{module}.scales", f"{module}.biases"] if f"{module}.scales" in weights else [f"{module}.weight"]

    def forward(scale: float, before: float) -> Arrays:
        now = dict(tree_flatten(model.parameters()))
        grown = probing.growth(config, scale, before)
        model.update(
            tree_unflatten([(name, now[name] * grown[ours]) for ours in grown for name in parts(ours) if name in now])
        )
        yield "logits", np.array(model(mx.array(request.batch[0]))[0, -KEPT:].astype(mx.float32))

    def step(ids: list[int], cache: Any) -> tuple[np.ndarray, Any]:
        return np.array(model(mx.array([ids]), cache=cache)[0, -1].astype(mx.float32)), cache

    digests = {
        names[name]: digest(np.array(weights[name])) for name in names if names[name] in kept and _plain(name, weights)
    }
    yield "report", _report({}, digests, None)
    yield from _run(config, request, forward, step, make_prompt_cache(model))


def _plain(name: str, weights: Mapping[str, Any]) -> bool:
    """Whether the library holds the tensor as it is, not quantised."""
    return name in weights and f"{name.removesuffix('.weight')}.scales" not in weights


def _report(said: dict[str, list[str]], digests: dict[str, str], ids: list[list[int]] | None) -> np.ndarray:
    return np.array(json.dumps({"said": said, "sha256": digests, "ids": ids}))


def _run(
    config: ModelConfig,
    request: Request,
    forward: Callable[[float, float], Arrays],
    step: Callable[[list[int], Any], tuple[np.ndarray, Any]],
    cache: Any,
) -> Arrays:
    """Every scale, then back to the first for what follows the prompt."""
    before = 1.0
    for scale in request.scales:
        for name, array in forward(scale, before):
            kind, _, rest = name.partition(".")
            yield ".".join(filter(None, (kind, probing.spell(scale), rest))), array
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
        yield "greedy.margins", probing.margins(np.stack(rows))


JUDGES = {"transformers": transformers_judge, "mlx-lm": mlx_lm_judge}


def main(argv: list[str]) -> int:
    """Writes --out. Exit code 2 and one line where the library cannot load or run the folder."""
    parser = argparse.ArgumentParser(prog="python -m convert.judges")
    parser.add_argument("judge", choices=list(JUDGES))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokens", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--probes", type=Path, help="texts for the tokenizer, a JSON list")
    parser.add_argument("--scale", type=float, action="append")
    parser.add_argument("--greedy", type=int, default=0)
    parser.add_argument("--prompt", type=int, default=1)
    parser.add_argument("--no-gradients", dest="gradients", action="store_false")
    args = parser.parse_args(argv)
    try:
        config = folder_config(args.folder)
        request = probing.request_of(vars(args))
        request.check(config, str(args.folder))
        probes = json.loads(args.probes.read_text()) if args.probes else []
        probing.write(args.out, JUDGES[args.judge](args.folder, config, request, probes))
    except Exception as error:  # whatever a library raises about a folder is what it has to say of it
        text = " ".join(f"{args.judge}: {error if isinstance(error, UserError) else repr(error)}".split())
        print(text[:500], file=sys.stderr)
        return 2
    return 0


def folder_config(place: Path) -> ModelConfig:
    """The model of a folder, quantised or not."""
    from convert.formats import open_model

    return open_model(place).config


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
