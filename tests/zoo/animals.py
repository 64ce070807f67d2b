"""An animal on disk: its file, the sample that its own code makes, and what it is in the fields of ModelConfig."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import torch

from zoo import in_mlx, in_numpy, in_torch
from zoo.choices import Spec
from zoo.weights import buffers, laid_out

# isort: split
import mlx.core as mx

T = 32


@dataclass(frozen=True)
class Animal:
    """What an adoption is given (file, sample), and what only the test knows."""

    spec: Spec
    file: Path
    sample: Path
    state: dict[str, np.ndarray]  # without buffers
    buffers: dict[str, np.ndarray]
    truth: dict[str, Any]
    run: Callable[[dict[str, np.ndarray], np.ndarray], tuple[np.ndarray, np.ndarray]]


def to_torch(array: np.ndarray) -> torch.Tensor:
    """The same bits."""
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(array.copy())


def to_mlx(array: np.ndarray) -> mx.array:
    """The same bits."""
    if array.dtype == ml_dtypes.bfloat16:
        return mx.array(array.view(np.uint16)).view(mx.bfloat16)
    return mx.array(array)


def truth(spec: Spec) -> dict[str, Any]:
    """The fields of ModelConfig, of an unfused model; those that nothing reads are left out."""
    kind = spec.norm.split()[0]
    known: dict[str, Any] = {
        "n_layer": spec.L, "n_head": spec.H, "n_kv_head": spec.K, "n_embd": spec.C, "head_dim": spec.D,
        "n_hidden": spec.F, "vocab_size": spec.V, "norm": kind, "norm_eps": spec.eps,
        "norm_weight": "bare" not in spec.norm, "norm_bias": spec.norm == "layer", "placement": spec.placement,
        "final_norm": spec.final, "activation": spec.act, "gated": spec.mlp != "plain",
        "attn_scale": spec.multiplier, "tied": spec.tie.startswith("tied"), "head_bias": spec.tie == "untied bias",
        "qkv_bias": spec.biased("q"), "out_bias": spec.biased("o"), "mlp_bias": spec.biased("up"),
        "embed_scale": spec.embed == "sqrt(C)", "embed_norm": spec.embed_norm, "qk_norm": spec.qk_norm,
        "logit_scale": spec.C**-0.5 if spec.logits == "scaled" else 0.0,
        "final_softcap": 15.0 if spec.logits == "capped" else 0.0,
    }  # fmt: skip
    if spec.bias == "not k":
        known["no_bias"] = ("attn.k_proj",)
    if spec.rotated:
        known |= {"position": "rope", "rope_theta": spec.theta, "rotary_dim": spec.rotated}
    elif spec.position.startswith("sin"):
        known |= {"position": "sinusoidal", "sinusoid": spec.position.split()[1], "position_multiplier": spec.waves}
    else:
        known["position"] = spec.position
    return known


def runner(spec: Spec, extra: dict[str, np.ndarray]) -> Callable:
    """Their own code: from a state dict, loaded strictly, and ids (T,) to logits and stream."""

    def run(state: dict[str, np.ndarray], ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if spec.framework == "numpy":
            assert state.keys() == laid_out(spec).keys()
            return in_numpy.forward(spec, state, ids)
        if spec.framework == "torch":
            tensors = {key: to_torch(array) for key, array in state.items()}
            empty = {key: to_torch(array) for key, array in laid_out(spec).items()}
            model = in_torch.Home(spec, empty, {key: to_torch(array) for key, array in extra.items()})
            model.load_state_dict({**model.state_dict(), **tensors}, strict=True)
            return in_torch.run(spec, model, ids)
        arrays = {key: to_mlx(array) for key, array in state.items()}
        home = in_mlx.Home(spec, {key: to_mlx(array) for key, array in laid_out(spec).items()})
        home.load_weights(list(arrays.items()), strict=True)
        return in_mlx.run(spec, home, ids)

    return run


def ids(spec: Spec, length: int = T, seed: int = 0) -> np.ndarray:
    """Random tokens."""
    return np.random.default_rng(spec.seed + 7000 + seed).integers(0, spec.V, length)


def make(spec: Spec, folder: Path) -> Animal:
    """Writes the animal's file and its sample."""
    folder.mkdir(parents=True, exist_ok=True)
    state, extra = laid_out(spec), buffers(spec)
    run = runner(spec, extra)
    sample, given = folder / "sample.npz", ids(spec)
    logits, stream = run(state, given)
    hidden = {"hidden": stream} if spec.seed % 3 == 0 else {}
    np.savez(sample, ids=given, logits=logits, **hidden)
    return Animal(spec, save(spec, folder, {**state, **extra}), sample, state, extra, truth(spec), run)


def save(spec: Spec, folder: Path, whole: dict[str, np.ndarray]) -> Path:
    """The file as the animal's owner would write it."""
    if spec.file == "npz":
        path = folder / "weights.npz"
        if spec.framework == "mlx":
            mx.savez(str(path), **{key: to_mlx(array) for key, array in whole.items()})
        else:
            np.savez(path, **whole)  # type: ignore[arg-type]
        return path
    if spec.file == "safetensors" and spec.framework == "mlx":
        path = folder / "model.safetensors"
        mx.save_safetensors(str(path), {key: to_mlx(array) for key, array in whole.items()})
        return path
    if spec.file == "safetensors":
        from safetensors.torch import save_file

        path = folder / "model.safetensors"
        save_file({key: to_torch(array) for key, array in whole.items()}, str(path))
        return path
    tensors = {key: to_torch(array) for key, array in whole.items()}
    if spec.file == "pt nested":
        path = folder / "ckpt.pt"
        weights = [tensors[key] for key in laid_out(spec)]
        groups = [
            {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1, "params": [*range(len(weights))]}
        ]
        moments = {
            n: {"step": torch.tensor(7.0), "exp_avg": w.float() * 0.01, "exp_avg_sq": w.float() ** 2 * 0.001}
            for n, w in enumerate(weights)
        }
        torch.save(
            {
                "model": tensors,
                "optimizer": {"state": moments, "param_groups": groups},
                "config": {"learning_rate": 3e-4, "batch_size": 12, "compile": True, "dataset": "shakespeare"},
                "iter_num": 700,
                "best_val_loss": 1.5,
            },
            path,
        )
        return path
    if spec.file == "pth wrapped":
        path = folder / "checkpoint.pth"
        before = "_orig_mod." if spec.seed % 2 else "module."
        torch.save({"epoch": 3, "model_state_dict": {before + key: t for key, t in tensors.items()}}, path)
        return path
    path = folder / ("pytorch_model.bin" if spec.file == "bin" else "model.pt")
    torch.save(tensors, path)
    return path
