"""THE table of parameters: name -> shape, initial value, and how it trains. Both frameworks build from it.

Names are GPT-2's without the ``transformer.`` prefix; matrices are [out, in] everywhere. h.N stands for a block:

    wte.weight (V, C)   wpe.weight (P, C)                         embeddings; wpe only with learned positions
    ln_e   h.N.ln_1   h.N.ln_2   ln_f                             norms (C,); embed_norm; parallel: one; final_norm
    h.N.ln_1_post   h.N.ln_2_post                                 placement sandwich: norms of the branches' outputs
    h.N.attn.c_attn ((H + 2 K) D, C)                              fused_qkv: rows are q, k, v
    h.N.attn.q_proj (H D, C)  k_proj  v_proj (K D, C)             otherwise
    h.N.attn.q_norm  k_norm (D,), or (H D,) and (K D,)            qk_norm head, or full
    h.N.attn.c_proj (C, H D)                                      attention's output
    h.N.mlp.c_gate (F, C)                                         gated
    h.N.mlp.c_gate_fc (2 F, C)                                    fused_mlp: rows of c_gate, then of c_fc
    h.N.mlp.c_fc (F, C)   h.N.mlp.c_proj (C, F)
    lm_head.weight (V, C)   lm_head.bias (V,)                     untied; head_bias, also where the weight is tied
    score.weight (n, C)                                           in its place where there are n labels

norm_weight, the fields of biases and no_bias say which modules have a weight and a bias.
V vocab_size, P block_size, C n_embd, H n_head, K n_kv_head, D head_dim, F n_hidden.
"""

import numbers
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from mlxgpt.common import rng
from mlxgpt.common.config import ModelConfig
from mlxgpt.common.errors import UserError, nearest
from mlxgpt.common.model.affine import Quantized


@dataclass(frozen=True)
class Param:
    """One tensor. ``std`` > 0: drawn from N(0, std^2); else the constant ``fill``. ``lr`` multiplies its rate.

    ``idle``: no logit depends on it. What all keys of a head share, softmax does not see; rope would turn it.
    """

    shape: tuple[int, ...]
    std: float = 0.0
    fill: float = 0.0
    decay: bool = False
    adaptable: bool = False
    zero_grad_at_init: bool = False
    lr: float = 1.0
    idle: bool = False


def table(config: ModelConfig) -> dict[str, Param]:
    """Every parameter of the model, in the order in which files list them.

    Matrices start from N(0, 0.02^2), the two that write into the residual stream from N(0, (0.02 / sqrt(2 n_layer))^2)
    (GPT-2, Radford et al. 2019, section 2.3); biases from 0, norms from 1. Decay acts on matrices (ndim >= 2).
    """
    c, width, kv = config.n_embd, config.n_head * config.head_dim, config.n_kv_head * config.head_dim
    residual = 0.02 / (2 * config.n_layer) ** 0.5
    params: dict[str, Param] = {}
    still = config.no_rope if config.position == "rope" else range(config.n_layer)
    last = "k_proj" if config.qk_norm == "none" else "k_norm"
    shared = set() if config.attn_softcap else {f"h.{n}.attn.{last}" for n in still}

    def bias(block: str, module: str, size: int) -> None:
        if config.has_bias(module):
            params[f"{block}{module}.bias"] = Param((size,), idle=f"{block}{module}" in shared)

    def linear(block: str, module: str, n_out: int, n_in: int, std: float = 0.02) -> None:
        params[f"{block}{module}.weight"] = Param((n_out, n_in), std=std, decay=True, adaptable=True)
        bias(block, module, n_out)

    def norm(block: str, module: str, size: int = c) -> None:
        if config.norm_weight:
            params[f"{block}{module}.weight"] = Param((size,), fill=0.0 if config.norm == "rms1" else 1.0)
        bias(block, module, size)

    params["wte.weight"] = Param((config.vocab_size, c), std=0.02, decay=True, adaptable=True)
    if config.position == "learned":
        params["wpe.weight"] = Param((config.block_size, c), std=0.02, decay=True)
    if config.embed_norm:
        norm("", "ln_e")
    for n in range(config.n_layer):
        block = f"h.{n}."
        norm(block, "ln_1")
        if config.fused_qkv:
            linear(block, "attn.c_attn", width + 2 * kv, c)
        else:
            linear(block, "attn.q_proj", width, c)
            linear(block, "attn.k_proj", kv, c)
            linear(block, "attn.v_proj", kv, c)
        if config.qk_norm != "none":
            norm(block, "attn.q_norm", width if config.qk_norm == "full" else config.head_dim)
            norm(block, "attn.k_norm", kv if config.qk_norm == "full" else config.head_dim)
        linear(block, "attn.c_proj", c, width, residual)
        if config.placement == "sandwich":
            norm(block, "ln_1_post")
        if config.placement != "parallel":
            norm(block, "ln_2")
        if config.fused_mlp:
            linear(block, "mlp.c_gate_fc", 2 * config.n_hidden, c)
        else:
            if config.gated:
                linear(block, "mlp.c_gate", config.n_hidden, c)
            linear(block, "mlp.c_fc", config.n_hidden, c)
        linear(block, "mlp.c_proj", c, config.n_hidden, residual)
        if config.placement == "sandwich":
            norm(block, "ln_2_post")
    if config.final_norm:
        norm("", "ln_f")
    if config.labels:
        params["score.weight"] = Param((len(config.labels), c), std=0.02, decay=True)
    elif not config.tied:
        linear("", "lm_head", config.vocab_size, c)
    elif config.head_bias:
        bias("", "lm_head", config.vocab_size)
    return params


def init_params(config: ModelConfig, seed: int) -> dict[str, np.ndarray]:
    """Initial weights as float32: a function of (seed, name) alone, so both frameworks start equal."""
    return {
        name: rng.normal(seed, "init", name, shape=param.shape, std=param.std)
        if param.std
        else np.full(param.shape, param.fill, dtype=np.float32)
        for name, param in table(config).items()
    }


def resize_vocab(arrays: Mapping[str, np.ndarray | Quantized], size: int) -> dict[str, np.ndarray | Quantized]:
    """``arrays`` with ``size`` rows in embedding and head; new ones are the mean of the others (Hewitt 2021).

    So a new token begins as likely as the average one, and moves no probability of the others.
    """
    made = dict(arrays)
    for name in ("wte.weight", "lm_head.weight", "lm_head.bias"):
        if name in made and made[name].shape[0] < size:
            array = made[name]
            array = array.dequantize() if isinstance(array, Quantized) else array
            mean = array.mean(axis=0, dtype=np.float64).astype(np.float32)
            made[name] = np.concatenate([array, np.broadcast_to(mean, (size - len(array), *array.shape[1:]))])
    return made


def with_head(arrays: Mapping[str, np.ndarray | Quantized], config: ModelConfig) -> dict[str, np.ndarray | Quantized]:
    """``arrays`` of a tied model for ``config``, where that is not tied: the head begins as the embedding."""
    wanted = not config.tied and not config.labels and "lm_head.weight" not in arrays
    return dict(arrays) | ({"lm_head.weight": arrays["wte.weight"]} if wanted else {})


def as_classifier(
    arrays: Mapping[str, np.ndarray | Quantized], config: ModelConfig, seed: int
) -> dict[str, np.ndarray | Quantized]:
    """``arrays`` of a language model or a classifier for ``config``, a classifier: a new ``score`` is drawn."""
    made = {name: array for name, array in arrays.items() if not name.startswith("lm_head.")}
    name, param = "score.weight", table(config)["score.weight"]
    return made if name in made else made | {name: rng.normal(seed, "init", name, shape=param.shape, std=param.std)}


def rate(dropout: float) -> float:
    """The rate of a model's dropout.

    Raises:
        UserError: it is not a number of at least 0 and below 1.
    """
    if isinstance(dropout, bool) or not isinstance(dropout, numbers.Real) or not 0 <= dropout < 1:
        raise UserError(f"dropout = {dropout!r}: expected a number of at least 0 and below 1")
    return float(dropout)


def seed_of(seed: int) -> int:
    """The seed of weights and dropout.

    Raises:
        UserError: it is not a whole number of at least 0.
    """
    if isinstance(seed, bool) or not isinstance(seed, numbers.Integral) or seed < 0:
        raise UserError(f"seed = {seed!r}: expected a whole number, 0 or more")
    return int(seed)


def count(config: ModelConfig) -> int:
    """The number of parameters."""
    return sum(int(np.prod(param.shape)) for param in table(config).values())


def check(
    shapes: Mapping[str, tuple[int, ...]], arrays: Mapping[str, np.ndarray | Quantized], where: str = "parameters"
) -> None:
    """Checks arrays against the expected names and shapes; all are float32, or quantized matrices.

    Raises:
        UserError: the first name that is missing or unknown, or the first other shape or dtype.
    """
    for name in arrays:
        if name not in shapes:
            raise UserError(f"{where}: unknown tensor {name}{nearest(name, shapes)}")
    for name, shape in shapes.items():
        if name not in arrays:
            raise UserError(f"{where}: tensor {name} is missing; expected shape {shape}")
        if tuple(arrays[name].shape) != tuple(shape):
            raise UserError(f"{where}: tensor {name} has shape {tuple(arrays[name].shape)}; expected {tuple(shape)}")
        array = arrays[name]
        if isinstance(array, np.ndarray) and array.dtype != np.float32:
            raise UserError(f"{where}: tensor {name} is {array.dtype}; expected float32")
