"""An animal through ``mlxgpt adopt`` and back, and everything that is wrong with what came of it."""

import contextlib
import io
import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from convert.formats.registry import format_of
from mlxgpt.cli import main
from mlxgpt.common.config import ModelConfig
from mlxgpt.trial import answer as mlx_answer
from torch_ref.trial import answer as torch_answer
from zoo.animals import Animal, ids, to_torch

GATE = 1e-5  # of the largest logit


@dataclass
class Adopted:
    """What the verb said, and what is wrong: ``faults`` is empty where everything is right."""

    code: int
    said: str  # on stderr
    report: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    errors: dict[str, float] = field(
        default_factory=dict
    )  # framework -> of the written folder, on four times the tokens
    faults: list[str] = field(default_factory=list)

    @property
    def undetermined(self) -> list[str]:
        """The choices that the sample left open."""
        return [row["name"] for row in self.report.get("choices", ()) if row["verdict"] == "undetermined"]


def verb(*args: str | Path) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command, in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main([str(arg) for arg in args])
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else 1
    return code, out.getvalue(), err.getvalue()


def adopt(animal: Animal, folder: Path, backend: str = "torch") -> Adopted:
    """Adopts the animal into ``folder``, of which nothing but its file and its sample is known, and looks at it."""
    start = time.perf_counter()
    code, out, err = verb(
        "adopt", animal.file, "--like", animal.sample, "--out", folder, "--backend", backend, "--json", "--force"
    )
    made = Adopted(code, err, seconds=time.perf_counter() - start)
    if code:
        made.faults.append(f"refused: {err.strip().splitlines()[-1] if err.strip() else code}")
        return made
    made.report = json.loads(out)
    given = ids(animal.spec, 128, 1)
    wanted = animal.run(animal.state, given)[0]
    for name, answer in (("mlx", mlx_answer), ("torch", torch_answer)):
        made.errors[name] = float(np.abs(answer(folder, given[None])[0] - wanted).max() / np.abs(wanted).max())
    made.faults += wrong(animal, format_of("hf").read(folder).config, made)
    made.faults += way_back(animal, folder)
    return made


def facts(config: ModelConfig) -> dict[str, Any]:
    """What a model is, however its fields say it; the fields that do nothing in it are left out."""
    same = ("n_layer", "n_head", "n_kv_head", "n_embd", "head_dim", "n_hidden", "vocab_size", "norm",
            "norm_eps", "norm_weight", "placement", "final_norm", "activation", "gated", "position", "tied",
            "embed_norm", "qk_norm", "logit_scale", "final_softcap", "attn_softcap", "window",
            "residual_multiplier")  # fmt: skip
    made = {name: getattr(config, name) for name in same}
    made["attn_scale"] = config.attn_scale or config.head_dim**-0.5
    made["embed_scale"] = config.n_embd**0.5 if config.embed_scale else config.embed_multiplier
    if config.position == "rope":
        made |= {"rope_theta": config.rope_theta, "rotary_dim": config.rotary_dim, "scaling": config.rope_scaling}
    if config.position == "sinusoidal":
        made |= {"sinusoid": config.sinusoid, "position_multiplier": config.position_multiplier}
    return made


def wrong(animal: Animal, found: ModelConfig, made: Adopted) -> list[str]:
    """Choices that are not the animal's, and are neither named as undetermined nor the same model.

    One that is said to be proved is wrong however near its logits are.
    """
    truth = facts(ModelConfig(family="mlxgpt", fused_qkv=False, block_size=animal.spec.P, **animal.truth))
    named = set(made.undetermined)
    rows = {row["name"]: row for row in made.report["choices"]}
    far = max(made.errors.values()) > GATE
    faults = []
    if far and not named:
        faults.append(f"logits off by {max(made.errors.values()):.1e} on 128 tokens, and nothing is undetermined")
    for name, value in facts(found).items():
        expected = truth.get(name)
        near = isinstance(value, float) and isinstance(expected, float) and np.isclose(value, expected, rtol=1e-6)
        if value == expected or near or (name == "placement" and _alike(animal, value, expected)):
            continue
        proved = rows.get(name, {}).get("verdict") == "proved"
        if proved or (far and name not in named):
            faults.append(f"{name} = {value}, expected {expected}{', and said to be proved' if proved else ''}")
    return faults


def _alike(animal: Animal, value: Any, expected: Any) -> bool:
    """One norm without weights for both branches, or one for each: the same."""
    return "bare" in animal.spec.norm and {value, expected} == {"parallel", "parallel2"}


def way_back(animal: Animal, folder: Path) -> list[str]:
    """What differs once the folder is written as their own file again, and read by their own code."""
    path = folder.parent / f"back-{folder.name}" / animal.file.name
    path.parent.mkdir(exist_ok=True)
    code, _, err = verb("convert", folder, path, "--map", folder / "map.toml", "--force")
    if code:
        return [f"way back: {err.strip().splitlines()[-1]}"]
    found, before = read_raw(path), read_raw(animal.file)
    weights = {name: array for name, array in before.items() if not _is_buffer(animal, name)}
    faults = [f"way back: {name} is missing" for name in weights if name not in found]
    faults += [f"way back: {name} was not there" for name in found if name not in before]
    for name, array in weights.items():
        other = found.get(name)
        if other is None:
            continue
        if other.dtype != array.dtype or other.shape != array.shape:
            faults.append(
                f"way back: {name} is {other.dtype} {tuple(other.shape)}, was {array.dtype} {tuple(array.shape)}"
            )
        elif not torch.equal(other.contiguous().view(torch.uint8), array.contiguous().view(torch.uint8)):
            faults.append(f"way back: {name} has other bits")
    if not faults:
        given = ids(animal.spec)
        prefix = next(
            (each for each in ("_orig_mod.", "module.") if all(name.startswith(each) for name in weights)), ""
        )
        state = {name.removeprefix(prefix): _array(found[name]) for name in weights}
        if not (animal.run(state, given)[0] == animal.run(animal.state, given)[0]).all():
            faults.append("way back: their own code gives other logits")
    return faults


def _is_buffer(animal: Animal, name: str) -> bool:
    return any(name.endswith(buffer) for buffer in animal.buffers)


def _array(tensor: torch.Tensor) -> np.ndarray:
    import ml_dtypes

    if tensor.dtype == torch.bfloat16:
        return tensor.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def read_raw(path: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a file under the name that it has there, whatever stands around them."""
    if path.suffix == ".safetensors":
        return load_file(path)
    if path.suffix == ".npz":
        return {name: to_torch(array) for name, array in np.load(path).items()}
    whole = torch.load(path, weights_only=True)
    inner = next((whole[key] for key in ("model", "model_state_dict") if key in whole), whole)
    return {name: value for name, value in inner.items() if isinstance(value, torch.Tensor)}
