"""What the decoder can do that no published family does: both frameworks against float64 and other implementations."""

import itertools
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ladder
import numpy as np
import own
import pytest
import torch
import transformers
from compare import agree, worst, worst_gradient
from models import NO_BIAS, tiny, weights
from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor

import mlxgpt.model
import torch_ref.fast
import torch_ref.model
from mlxgpt import blas, fast  # noqa: F401  (a BLAS must be loaded before MLX)
from mlxgpt.common.config import ModelConfig
from mlxgpt.common.model import params, positions
from mlxgpt.common.recipes import build

# isort: split
import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

PAIRS = own.pairwise()
PACKAGES = ("mlxgpt", "torch_ref")
Patch = Callable[[pytest.MonkeyPatch], None]


def of(package: str, config: ModelConfig, made: Mapping[str, Any]) -> Any:
    """A framework's model with these weights."""
    if package == "torch_ref":
        return ladder.torch_model(config, made, torch.float32).requires_grad_(False)
    model = mlxgpt.model.Model(config, seed=None)
    model.update(tree_unflatten([(name, mx.array(value)) for name, value in made.items()]))
    return model


def run(model: Any, ids: Any, cache: Any = None, **given: np.ndarray) -> np.ndarray:
    """Logits; arguments are numpy's."""
    if "mlxgpt" in type(model).__module__:
        return np.array(model(mx.array(ids), cache=cache, **{name: mx.array(each) for name, each in given.items()}))
    return model(torch.tensor(ids), cache=cache, **{name: torch.tensor(each) for name, each in given.items()}).numpy()


def figures(config: ModelConfig) -> tuple[float, float]:
    """How far logits and gradients of both frameworks, with losses in chunks, are from torch in float64 at most.

    Matrices times 4: at normal weights some attention is so flat that its gradients are rounding.
    """
    made = weights(config, scale=4.0)
    exact = ladder.torch_probe(config, made, torch.float64)
    logits, gradients = 0.0, 0.0
    for probe in (ladder.mlx_probe, ladder.torch_probe):
        found = probe(config, made, loss_chunk=ladder.CHUNK)
        logits = max(logits, worst("logits", found.logits, exact.logits))
        gradients = max(gradients, worst_gradient("gradients", found.gradients, exact.gradients))
    return logits, gradients


@pytest.mark.parametrize("case", PAIRS)
def test_every_pair_of_choices_computes_as_torch_in_float64(case: str) -> None:
    """Gates: four times the largest measured, 5e-7 and 9e-6."""
    logits, gradients = figures(PAIRS[case])
    assert logits < 2e-6 and gradients < 4e-5


def test_every_pair_of_choices_is_among_them() -> None:
    assert len({value for config in PAIRS.values() for value in (config.position, config.sinusoid)}) == 5 + 3
    assert {(config.placement, config.position) for config in PAIRS.values()} >= {
        (placement, position)
        for placement in ("pre", "post", "sandwich", "post_add", "parallel", "parallel2")
        for position in ("learned", "rope", "sinusoidal", "alibi", "none")
    }


# other implementations of the same model


def judged(config: ModelConfig, made: dict[str, np.ndarray], ids: np.ndarray, expected: np.ndarray) -> None:
    """Both frameworks give the logits of another implementation."""
    assert {name: value.shape for name, value in made.items()} == {
        name: param.shape for name, param in params.table(config).items()
    }
    for package in PACKAGES:
        found = run(of(package, config, {name: np.float32(value) for name, value in made.items()}), ids)
        agree(package, found, expected, 1e-5)


def theirs(state: Any, names: dict[str, str], n_layer: int = 2) -> dict[str, np.ndarray]:
    """Our name -> its array, by the modules' names (ours -> theirs); {} is the block."""
    found = {
        (ours.format(n), other.format(n)) for ours, other in names.items() for n in range(n_layer)
    }  # those without a block are there once
    return {
        f"{ours}.{kind}": np.array(state[f"{other}.{kind}"])
        for ours, other in sorted(found)
        for kind in ("weight", "bias")
        if f"{other}.{kind}" in state
    }


IDS = np.random.default_rng(3).integers(0, 50, (2, 24))
SIZES: dict[str, Any] = own.SIZES | {"n_hidden": 144}


def scaled(module: torch.nn.Module) -> Any:
    """The module with no tensor that is constant, and matrices that attend to something."""
    torch.manual_seed(5)
    with torch.no_grad():
        for value in module.parameters():
            value.copy_(0.15 * value / value.std() if value.ndim > 1 else value + 0.1 * torch.randn_like(value))
    return module.requires_grad_(False)


@pytest.mark.parametrize("norm_first", [False, True])
def test_the_blocks_of_2017_are_those_of_torch(norm_first: bool) -> None:
    """TransformerEncoderLayer in float64 with a causal mask, the paper's sinusoids, embeddings times sqrt(C)."""
    layer = torch.nn.TransformerEncoderLayer(36, 6, 144, 0.0, "relu", batch_first=True, norm_first=norm_first)
    encoder = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    whole = scaled(
        torch.nn.ModuleDict({"emb": torch.nn.Embedding(50, 36), "enc": encoder, "out": torch.nn.Linear(36, 50)})
    )
    state = {name.replace("in_proj_", "in_proj."): value.numpy() for name, value in whole.state_dict().items()}
    names = {"wte": "emb", "lm_head": "out", "h.{}.attn.c_attn": "enc.layers.{}.self_attn.in_proj"}
    inside = {"attn.c_proj": "self_attn.out_proj", "mlp.c_fc": "linear1", "mlp.c_proj": "linear2", "ln_1": "norm1"}
    names |= {f"h.{{}}.{ours}": f"enc.layers.{{}}.{other}" for ours, other in (inside | {"ln_2": "norm2"}).items()}
    table = np.array(
        [[(math.sin, math.cos)[i % 2](t / 10000 ** ((i - i % 2) / 36)) for i in range(36)] for t in range(24)]
    )
    whole.double()
    x = whole["emb"](torch.tensor(IDS)) * 6 + torch.from_numpy(table)
    mask = torch.nn.Transformer.generate_square_subsequent_mask(24, dtype=torch.float64)
    expected = whole["out"](whole["enc"](x, mask=mask)).numpy()
    placement = "pre" if norm_first else "post_add"
    config = tiny(
        **SIZES, placement=placement, activation="relu", position="sinusoidal", embed_scale=True, tied=False,
        head_bias=True, final_norm=False,
    )  # fmt: skip
    judged(config, theirs(state, names), IDS, expected)


def test_mlxs_transformer_is_a_model_of_ours() -> None:
    """As mlx-examples' transformer_lm: TransformerEncoder, SinusoidalPositionalEncoding, Linear."""
    mx.random.seed(4)
    emb, pe, out = nn.Embedding(50, 36), nn.SinusoidalPositionalEncoding(36), nn.Linear(36, 50)
    enc = nn.TransformerEncoder(2, 36, 6, 144, norm_first=True)
    state = {
        f"{part}.{name}": np.array(value)
        for part, module in (("emb", emb), ("enc", enc), ("out", out))
        for name, value in tree_flatten(module.parameters())
    }
    names = {"wte": "emb", "lm_head": "out", "ln_f": "enc.ln"}
    inside = {
        f"attn.{p}_proj": f"attention.{other}_proj" for p, other in zip("qkv", ("query", "key", "value"), strict=True)
    }
    inside |= {"attn.c_proj": "attention.out_proj", "mlp.c_fc": "linear1", "mlp.c_proj": "linear2"}
    inside |= {"ln_1": "ln1", "ln_2": "ln2"}
    names |= {f"h.{{}}.{ours}": f"enc.layers.{{}}.{other}" for ours, other in inside.items()}
    x = emb(mx.array(IDS))
    x = x + pe(mx.arange(24))
    expected = np.array(out(enc(x, nn.MultiHeadAttention.create_additive_causal_mask(24))))
    config = tiny(
        **SIZES, activation="relu", position="sinusoidal", sinusoid="span", position_multiplier=(2 / 36) ** 0.5,
        fused_qkv=False, qkv_bias=False, out_bias=False, tied=False, head_bias=True,
    )  # fmt: skip
    judged(config, theirs(state, names), IDS, expected)


def test_bloom_is_a_model_of_ours() -> None:
    """ALiBi with six heads, no power of two, and a norm of the embeddings."""
    model = scaled(
        transformers.BloomForCausalLM(transformers.BloomConfig(vocab_size=50, hidden_size=36, n_layer=2, n_head=6))
    )
    state = {name.removeprefix("transformer."): value.numpy() for name, value in model.state_dict().items()}
    names = {"wte": "word_embeddings", "ln_e": "word_embeddings_layernorm", "ln_f": "ln_f"}
    inside = {"ln_1": "input_layernorm", "ln_2": "post_attention_layernorm", "attn.c_proj": "self_attention.dense"}
    inside |= {"attn.c_attn": "self_attention.query_key_value"}
    inside |= {"mlp.c_fc": "mlp.dense_h_to_4h", "mlp.c_proj": "mlp.dense_4h_to_h"}
    names |= {f"h.{{}}.{ours}": f"h.{{}}.{other}" for ours, other in inside.items()}
    config = tiny(**SIZES, position="alibi", embed_norm=True, qkv_by_head=True)
    judged(config, theirs(state, names), IDS, model.double()(torch.tensor(IDS)).logits.numpy())


def test_nanochat_is_a_model_of_ours() -> None:
    """Squared ReLU, RMSNorm without weights on embeddings, queries and keys too; its rope turns the other way."""
    theirs_config = transformers.NanoChatConfig(
        vocab_size=50, hidden_size=36, intermediate_size=144, num_hidden_layers=2, num_attention_heads=6,
        num_key_value_heads=2, max_position_embeddings=24,
    )  # fmt: skip
    model = scaled(transformers.NanoChatForCausalLM(theirs_config))
    state = {name.removeprefix("model."): value.numpy() for name, value in model.state_dict().items()}
    for name in state:
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            state[name] = state[name].reshape(-1, 2, 3, 36)[:, ::-1].reshape(-1, 36)
    names = {"wte": "embed_tokens", "lm_head": "lm_head"}
    inside = {f"attn.{p}_proj": f"self_attn.{p}_proj" for p in "qkv"} | {"attn.c_proj": "self_attn.o_proj"}
    inside |= {"mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
    names |= {f"h.{{}}.{ours}": f"layers.{{}}.{other}" for ours, other in inside.items()}
    config = tiny(
        **SIZES, **NO_BIAS, n_kv_head=2, position="rope", norm="rms", norm_eps=1e-6, norm_weight=False, qk_norm="head",
        embed_norm=True, activation="relu2", fused_qkv=False, tied=False, final_softcap=15.0,
    )  # fmt: skip
    judged(config, theirs(state, names), IDS, model.double()(torch.tensor(IDS)).logits.numpy())


@pytest.mark.parametrize("n_head", [1, 2, 3, 5, 6, 7, 8, 12, 20, 32])
def test_slopes_are_those_of_mpt_for_any_number_of_heads(n_head: int) -> None:
    expected = build_mpt_alibi_tensor(n_head, 2)[:, 0, 0].double().numpy()  # what the token before gets
    assert positions.slopes(n_head).dtype == np.float32
    assert worst("slopes", -positions.slopes(n_head), expected) < 1e-7


@pytest.mark.parametrize("sinusoid", ["pairs", "halves", "span"])
def test_sinusoids_are_rounded_once(sinusoid: str) -> None:
    config = tiny(**SIZES, position="sinusoidal", sinusoid=sinusoid, rope_theta=200.0, position_multiplier=0.3)
    for t, row in enumerate(positions.sinusoids(config)):
        for i, value in enumerate(row):
            pair, is_cos = (i // 2, i % 2) if sinusoid == "pairs" else (i % 18, i // 18)
            angle = t * 200.0 ** (-pair / (17 if sinusoid == "span" else 18))
            expected = 0.3 * (math.cos if is_cos else math.sin)(angle)
            assert value.dtype == np.float32 and abs(value - expected) <= 2**-25 * abs(expected) + 1e-12


# positions in a cache, behind padding, and in a packed row

PLACED = {
    "pairs": dict(position="sinusoidal"),
    "span": dict(position="sinusoidal", sinusoid="span", placement="post_add", final_norm=False),
    "alibi": dict(position="alibi", n_kv_head=2),
    "alibi, window": dict(position="alibi", window=6, window_layers=[1], embed_norm=True),
    "alibi, capped": dict(position="alibi", attn_softcap=1.5),
    "none": dict(position="none", norm="rms", norm_weight=False, qk_norm="head"),
    "scaled": dict(position_multiplier=0.5, embed_scale=True, head_bias=True),
}


@pytest.mark.parametrize("case", PLACED)
@pytest.mark.parametrize("package", PACKAGES)
def test_a_cache_padding_and_packing_change_nothing(package: str, case: str) -> None:
    config = tiny(**SIZES, **PLACED[case])
    module, model = (
        {"mlxgpt": mlxgpt.model, "torch_ref": torch_ref.model}[package],
        of(package, config, weights(config, scale=4.0)),
    )
    long, short = IDS[0], IDS[1, :9]
    alone, brief = run(model, long[None]), run(model, short[None])
    assert worst("the tokens matter", alone[:, :9], brief) > 1e-2
    cache = module.make_cache(model, 1, 24)
    edges = (0, 5, 6, 7, 16, 24)
    parts = [run(model, long[None, a:b], cache=cache) for a, b in itertools.pairwise(edges)]
    agree("cached", np.concatenate(parts, axis=1), alone, 2e-6)
    padded = np.stack([long, np.concatenate([np.zeros(15, int), short])])
    places = np.stack([np.arange(24), np.maximum(np.arange(24) - 15, 0)])
    cache = module.make_cache(model, 2, 24)
    parts = [
        run(model, padded[:, a:b], cache=cache, positions=places[:, a:b], pad=np.array([0, 15]))
        for a, b in ((0, 20), (20, 24))
    ]
    found = np.concatenate(parts, axis=1)
    agree("padded, the long row", found[:1], alone, 2e-6)
    agree("padded, the short row", found[1:, 15:], brief, 2e-6)
    packed = np.concatenate([short, long[:15]])[None]
    segments, places = np.repeat([1, 2], [9, 15])[None], np.concatenate([np.arange(9), np.arange(15)])[None]
    found = run(model, packed, positions=places, segments=segments)
    agree("packed, the first", found[:, :9], brief, 2e-6)
    agree("packed, the second", found[:, 9:], alone[:, :15], 2e-6)


@pytest.mark.parametrize("where", ["CPU", "Metal"])
@pytest.mark.parametrize("more", [{}, {"attn_softcap": 1.5, "window": 6, "window_layers": [0]}])
def test_alibi_in_tiles_is_alibi_whole(where: str, more: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of MLX: on a CPU, and on a GPU that is one by name alone; a kernel that knows no slopes is never asked."""
    config = tiny(**SIZES, position="alibi", n_kv_head=2, **more)
    made, used = weights(config, scale=4.0), []
    exact = ladder.torch_probe(config, made, torch.float64)
    if where == "CPU":
        monkeypatch.setattr(fast, "MANY", 1)
        monkeypatch.setattr(fast, "TILE", 7)
        plain = fast.attention
        monkeypatch.setattr(fast, "attention", lambda *given: used.append(1) or plain(*given))
    else:
        monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
        monkeypatch.setattr(fast, "tile", lambda *_: used.append(1) or 7)
        monkeypatch.setattr(fast, "FUSED", {6})
    found = ladder.mlx_probe(config, made)
    agree("logits", found.logits, exact.logits, 2e-6)
    assert worst_gradient("gradients", found.gradients, exact.gradients) < 4e-5
    assert bool(used) == (where == "Metal" or not more)
    used.clear()
    model = of("mlxgpt", config, made)
    model.eval()
    tokens = ladder.batch(config)[0]
    cache = mlxgpt.model.make_cache(model, len(tokens), 24)
    parts = [run(model, tokens[:, a:b], cache=cache) for a, b in ((0, 11), (11, 23), (23, 24))]
    agree("without a gradient", np.concatenate(parts, axis=1), exact.logits, 2e-6)
    assert bool(used) == (where == "Metal" or not more)


# training

TRAINED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "2017": (
        dict(position="sinusoidal", activation="relu", placement="post_add", embed_scale=True, final_norm=False),
        {"dropout": 0.1},
    ),
    "bloom": (
        dict(position="alibi", embed_norm=True, head_bias=True, no_bias=["attn.c_attn"]),
        {"checkpoint_activations": True, "micro_batch_size": 4},
    ),
    "nanochat": (
        dict(position="rope", norm="rms", norm_weight=False, qk_norm="head", embed_norm=True, activation="relu2",
             tied=False, final_softcap=15.0, **NO_BIAS),
        {"compile": "auto"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", TRAINED)
def test_both_frameworks_train_alike(case: str) -> None:
    model, more = TRAINED[case]
    sizes = {"family": "mlxgpt", "n_layer": 2, "n_head": 4, "n_embd": 48, "block_size": 48, "vocab_size": 128}
    optim = {"lr": 2e-3, "min_lr": 1e-4, "warmup": 5}
    train = {"steps": 20, "batch_size": 8, "compile": "off"} | more
    recipe = build({"model": sizes | model, "optim": optim, "train": train})
    found, expected = (ladder.curve(ladder.trained(package, recipe)) for package in PACKAGES)
    assert expected[-1] < expected[0] - 0.5
    for figure in ladder.same_curve(case, found, expected):
        assert figure.agrees, figure


def test_what_one_framework_saved_the_other_continues(tmp_path: Path) -> None:
    recipe = build(
        {
            "model": dict(family="mlxgpt", n_layer=2, n_head=4, n_embd=48, block_size=48, vocab_size=128)
            | TRAINED["bloom"][0],
            "train": {"steps": 8, "batch_size": 4},
        }
    )
    for figure in ladder.crossing("bloom", recipe, tmp_path)[1]:
        assert figure.agrees, figure


# what the comparisons must catch


def changed(module: Any, name: str, change: Callable[[Any], Any]) -> Patch:
    """``name`` of a module, whose result is changed."""
    plain = getattr(module, name)
    return lambda patch: patch.setattr(module, name, lambda *given: change(plain(*given)))


def with_field(name: str, value: Any) -> Patch:
    """A field of the model that is judged is another."""
    plain = tiny
    return lambda patch: patch.setitem(globals(), "tiny", lambda **fields: plain(**fields | {name: value}))


def unsquared(patch: pytest.MonkeyPatch) -> None:
    for module in (mlxgpt.model, torch_ref.model):
        plain = module.activate
        patch.setattr(module, "activate", lambda x, kind, plain=plain: plain(x, "relu" if kind == "relu2" else kind))


MUTATIONS: dict[str, tuple[Patch, Callable[[], None]]] = {
    "slopes of the next head": (
        changed(positions, "slopes", lambda made: np.roll(made, 1)),
        test_bloom_is_a_model_of_ours,
    ),
    "slopes times ln 2": (
        changed(positions, "slopes", lambda made: made * np.float32(0.7)),
        test_bloom_is_a_model_of_ours,
    ),
    "sin and cos swapped": (
        changed(positions, "sinusoids", lambda made: made.reshape(24, 18, 2)[:, :, ::-1].reshape(24, 36)),
        lambda: test_the_blocks_of_2017_are_those_of_torch(False),
    ),
    "sinusoids in halves": (with_field("sinusoid", "halves"), lambda: test_the_blocks_of_2017_are_those_of_torch(True)),
    "norms of the branches": (
        with_field("placement", "post"),
        lambda: test_the_blocks_of_2017_are_those_of_torch(False),
    ),
    "another last frequency": (with_field("sinusoid", "halves"), test_mlxs_transformer_is_a_model_of_ours),
    "another multiplier": (with_field("position_multiplier", 0.24), test_mlxs_transformer_is_a_model_of_ours),
    "ReLU without its square": (unsquared, test_nanochat_is_a_model_of_ours),
    "another epsilon": (with_field("norm_eps", 1e-4), test_nanochat_is_a_model_of_ours),
    "a distance twice as far in torch": (
        changed(torch_ref.fast, "lean", lambda made: 2 * made),
        test_bloom_is_a_model_of_ours,
    ),
}


@pytest.mark.parametrize("case", MUTATIONS)
def test_a_wrong_choice_is_seen(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    patch, judge = MUTATIONS[case]
    patch(monkeypatch)
    with pytest.raises(AssertionError, match="is over the gate"):
        judge()
