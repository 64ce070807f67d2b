"""What torch_ref does on CUDA and on MPS, as far as a CPU shows it: its kernels, its waits, and what it avoids."""

import dataclasses
import itertools
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from compare import agree
from doubles.torch_gpu import Gpu, Log
from models import CASES, tiny
from packaging.requirements import Requirement
from test_engine import batch, engine, recipe
from torch._dynamo.testing import CompileCounterWithBackend

import torch_ref.engine
import torch_ref.probe
from mlxgpt.common.batch import Batch
from mlxgpt.common.config import AdapterConfig, OptimConfig, Recipe, SampleConfig, TrainConfig, TuneConfig
from mlxgpt.common.inference.probe import Request
from mlxgpt.common.model import adapters, params, positions
from mlxgpt.common.model.params import Param
from torch_ref import fast, fused, optim
from torch_ref.attention import attend
from torch_ref.generate import generate, keep
from torch_ref.model import Model

CPU = torch.device("cpu")

EVERY: dict[str, Any] = dict(
    top_p=0.7, top_k=20, min_p=0.01, repetition_penalty=1.1, presence_penalty=0.5, frequency_penalty=0.1
)  # settings of sampling


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    """CUDA's branches."""
    return Gpu("cuda", monkeypatch)


@pytest.fixture
def mps(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    """Those of MPS."""
    return Gpu("mps", monkeypatch)


@pytest.fixture
def deterministic() -> Iterator[None]:
    """PyTorch in deterministic mode."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def packed(config: Recipe, step: int) -> Batch:
    """Two texts a row, the second from the twelfth token on."""
    made = batch(config, step)
    segments, positions = np.zeros_like(made.tokens), np.tile(np.arange(made.tokens.shape[1], dtype=np.int32), (6, 1))
    segments[:, 12:] = 1
    positions[:, 12:] -= 12
    return dataclasses.replace(made, segments=segments, positions=positions)


def case(name: str, optim: str = "adamw", **train: Any) -> Recipe:
    """A recipe for one of CASES."""
    return dataclasses.replace(recipe(optim=optim, **train), model=CASES[name])


def losses(config: Recipe, of: Callable[[Recipe, int], Batch] = batch, steps: int = 3) -> np.ndarray:
    """Mean loss a step, and one validation loss."""
    made, rows = engine("torch_ref", config), config.train.micro_batch_size
    stats = [made.train_step(step, of(config, step).split(rows), 1e-2) for step in range(1, steps + 1)]
    sums = made.evaluate(of(config, 1))
    return np.array([*(stat.loss_sum / stat.weight for stat in stats), sums["loss"] / sums["weight"]])


CURVES: dict[str, tuple[Recipe, Callable[[Recipe, int], Batch]]] = {
    "gpt2": (case("gpt2", compile="off"), batch),
    "muon, dropout": (case("llama-gqa", "muon", dropout=0.2, micro_batch_size=4, compile="off"), packed),
    "packed, window, softcap": (case("gemma2", compile="off"), packed),
    "packed, grouped heads": (case("qwen3", compile="off"), packed),
}


@pytest.mark.parametrize("name", CURVES)
def test_the_branches_for_cuda_give_the_cpus_curve(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config, of = CURVES[name]
    expected = losses(config, of)
    Gpu("cuda", monkeypatch)
    agree(name, losses(config, of), expected, 1e-5)


@pytest.mark.parametrize(("optimizer", "dropout"), [("adamw", 0.0), ("muon", 0.1)])
def test_a_step_on_cuda_waits_once_for_what_it_reads_and_copies_a_batch_once(
    optimizer: str, dropout: float, cuda: Gpu
) -> None:
    config = case("llama", optimizer, dropout=dropout, micro_batch_size=3, compile="off")
    made = engine("torch_ref", config)
    batches = [packed(config, step).split(3) for step in (1, 2)]
    made.train_step(1, batches[0], 1e-2)
    cuda.watch()
    updated: list[int] = []
    plain = fused.adamw
    with pytest.MonkeyPatch.context() as patch, Log() as log:
        patch.setattr(fused, "adamw", lambda *args: (updated.append(len(cuda.events)), plain(*args)))
        made.train_step(2, batches[1], 1e-2)
    assert cuda.waits == [] and "_local_scalar_dense" not in log.names
    assert cuda.events == ["recorded", "waited"]
    assert set(updated) == {1}, "the update is queued behind the copy, before anyone waits for it"
    assert cuda.copies == [True] * (2 + bool(dropout)), "two micro-batches, and the keys of what is random"


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_the_device_itself_skips_what_is_not_finite(optimizer: str, bad: float, cuda: Gpu) -> None:
    config = case("gpt2", optimizer, compile="off")
    made = engine("torch_ref", config)
    made.train_step(1, [batch(config, 1)], 1e-2)
    before = made.snapshot()
    poisoned = batch(config, 2)
    poisoned.weights[2, 5] = bad
    stats = made.train_step(2, [poisoned], 1e-2)
    after = made.snapshot()
    assert not stats.finite and made.t == 1
    for key in ("params", "m", "v"):
        assert all((before[key][name] == after[key][name]).all() for name in before[key]), key
    assert made.train_step(3, [batch(config, 3)], 1e-2).finite and made.t == 2


@pytest.mark.parametrize("clip", [0.0, 1e-3, 1e3])
def test_fused_updates_are_those_of_one_tensor_at_a_time(clip: float) -> None:
    """With the rates of LoRA+, decay on some, and matrices of two shapes for Muon."""
    table = {
        "a": Param((5, 7), decay=True), "b": Param((7,)), "c": Param((3, 4), decay=True, lr=16.0), "d": Param((4,)),
        "h.e": Param((6, 4), decay=True), "h.f": Param((6, 4), decay=True), "h.g": Param((4, 6), decay=True),
    }  # fmt: skip
    muon, config = {"h.e", "h.f", "h.g"}, OptimConfig(name="muon", clip=clip)
    assert sorted(map(sorted, fused.groups(table, muon))) == [["a"], ["b", "d"], ["c"], ["h.e", "h.f"], ["h.g"]]
    torch.manual_seed(0)
    start = [{name: torch.randn(param.shape) for name, param in table.items()} for _ in range(3)]
    (p, m, v), (p2, m2, v2) = ([{n: a.clone() for n, a in group.items()} for group in start] for _ in range(2))
    for each in (v, v2):
        each.update({name: array.abs() for name, array in each.items()})
    weight = 37.0
    for t in (1, 2, 3):
        grads = {name: torch.randn(param.shape) * weight for name, param in table.items()}
        squares = torch.stack([(g / weight).square().sum() for g in grads.values()])
        s, norm = optim.scalars(config, 1e-2, t), float(squares.double().sum().sqrt())
        for name, param in table.items():
            g = grads[name] / weight * (min(clip / (norm + 1e-6), 1.0) if clip else 1.0)
            if name in muon:
                optim.muon(p[name], g, m[name], s, config)
            else:
                optim.adamw(p[name], g, m[name], v[name], s, param, config)
        shrink, skip = fused.verdict(torch.zeros(3), squares, weight, clip)
        for names in fused.groups(table, muon):
            three = [(p2[name], grads[name].clone(), m2[name]) for name in names]
            if names[0] in muon:
                fused.muon(three, shrink, skip, s, config)
            else:
                four = [(*each, v2[name]) for each, name in zip(three, names, strict=True)]
                fused.adamw(four, 1e-2, t, shrink, skip, table[names[0]], config)
    for name in table:
        agree(f"{name}, weights", p2[name].numpy(), p[name].numpy(), 2e-6)
        agree(f"{name}, momentum", m2[name].numpy(), m[name].numpy(), 1e-6)


@pytest.mark.parametrize(
    ("heads", "packs", "window", "softcap"),
    [*itertools.product([4, 2], [False, True], [0, 7], [0.0]), (2, True, 7, 5.0)],
)
def test_flex_attention_is_attention_under_the_dense_mask(
    heads: int, packs: bool, window: int, softcap: float, cuda: Gpu
) -> None:
    torch.manual_seed(1)
    T, D = 50, 16
    q, k, v = (torch.randn(3, n, T, D) for n in (4, heads, heads))
    segments = torch.tensor([[0] * 20 + [1] * 30, [0] * 50, [0] + [1] * 40 + [2] * 9]) if packs else None
    i, j = torch.arange(T)[:, None], torch.arange(T)[None, :]
    dense = (j <= i) & (i - j < (window or T))
    if segments is not None:
        dense = dense & (segments[:, None, :, None] == segments[:, None, None, :])
    found = []
    for mask in (fast.block_mask(T, window, segments, CPU), dense):
        given: Any = [each.clone().requires_grad_() for each in (q, k, v)]
        y = attend(given[0], given[1], given[2], mask, None, 0.3, softcap)
        found.append([y, *torch.autograd.grad((y * torch.linspace(0, 1, D)).sum(), given)])
    for what, flexible, plain in zip(("output", "dq", "dk", "dv"), *found, strict=True):
        agree(what, flexible.detach().numpy(), plain.detach().numpy(), 2e-6)


@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_flex_attention_leans_as_a_mask_of_floats_does(softcap: float, cuda: Gpu) -> None:
    torch.manual_seed(2)
    q, k, v = (torch.randn(2, n, 40, 16, requires_grad=True) for n in (6, 2, 2))
    segments = torch.tensor([[0] * 15 + [1] * 25, [0] * 40])
    i, slopes = torch.arange(40), torch.from_numpy(positions.slopes(6))
    dense = (i[None, :] <= i[:, None]) & (segments[:, None, :, None] == segments[:, None, None, :])
    dense = torch.where(dense, fast.lean(slopes, 40, 40, torch.float32), -float("inf"))
    found = []
    for mask in (fast.block_mask(40, 0, segments, CPU), dense):
        y = attend(q, k, v, mask, None, 0.3, softcap, slopes)
        found.append([y, *torch.autograd.grad((y * torch.linspace(0, 1, 16)).sum(), (q, k, v))])
    for what, flexible, plain in zip(("output", "dq", "dk", "dv"), *found, strict=True):
        agree(what, flexible.detach().numpy(), plain.detach().numpy(), 2e-6)


@pytest.mark.parametrize(
    ("name", "of", "train", "blocks"),
    [
        ("gpt2", batch, {}, False),  # flash attention knows the causal mask
        ("gpt2", packed, {}, True),
        ("mistral", batch, {}, True),
        ("gemma2", batch, {}, True),
        ("gemma2", batch, {"checkpoint_activations": True}, False),  # wrong gradients where a cap is recomputed
        ("mistral", batch, {"checkpoint_activations": True}, True),
        ("gpt2", packed, {"dropout": 0.1}, False),  # of attention weights, which our own hash drops
        ("llama", packed, {}, False),  # heads of 12
        ("alibi", batch, {}, True),
        ("alibi", batch, {"checkpoint_activations": True}, False),
    ],
)
def test_cuda_has_blocks_where_a_mask_would_be_dense(
    name: str, of: Callable[[Recipe, int], Batch], train: dict[str, Any], blocks: bool, cuda: Gpu,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    others = {"gpt2": tiny(family="gpt2", n_embd=64), "alibi": tiny(family="mlxgpt", n_embd=64, position="alibi")}
    model = (CASES | others)[name]
    config = dataclasses.replace(recipe(compile="off", **train), model=model)
    seen: list[str] = []
    monkeypatch.setattr(fast, "flex", lambda q, k, v, *_: (seen.append("flex"), q * k.sum() * v.sum())[1])
    plain = F.scaled_dot_product_attention

    def spy(*args: Any, **kwargs: Any) -> torch.Tensor:
        seen.append("dense" if kwargs["attn_mask"] is not None else "causal")
        return plain(*args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    engine("torch_ref", config).train_step(1, [of(config, 1)], 1e-3)
    assert ("flex" in seen) == blocks and not (blocks and "dense" in seen), seen


@pytest.mark.parametrize(("dtype", "repeats"), [(torch.float32, True), (torch.bfloat16, False)])
def test_cuda_repeats_grouped_heads_where_no_kernel_groups(
    dtype: torch.dtype, repeats: bool, cuda: Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    """float32 has the memory-efficient kernel alone, which has no groups; bfloat16 has flash attention."""
    q, k, v = (torch.randn(2, n, 9, 16, dtype=dtype) for n in (6, 2, 2))
    plain, seen = F.scaled_dot_product_attention, []

    def spy(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        seen.append((k.shape[1], v.shape[1], kwargs["enable_gqa"]))
        return plain(q, k, v, **kwargs)

    expected = plain(q, k, v, is_causal=True, scale=0.2, enable_gqa=True)
    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    agree("output", attend(q, k, v, "causal", None, 0.2, 0.0).float().numpy(), expected.float().numpy(), 1e-6)
    assert seen == [(6, 6, False) if repeats else (2, 2, True)]


MPS = [
    case("gpt2", compute_dtype="bfloat16"),
    case("llama-gqa"),
    case("gpt2-untied", loss_chunk=16, label_smoothing=0.1),
]


@pytest.mark.parametrize("config", MPS, ids=["bfloat16", "grouped", "chunks"])
@pytest.mark.parametrize("method", ["", "lora", "dora", "lora from pissa"])
def test_mps_gets_contiguous_heads_two_axes_and_no_float64(
    config: Recipe, method: str, mps: Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = params.init_params(config.model, 3)
    if method:
        method, _, start = method.partition(" from ")
        adapter = AdapterConfig(method=method, rank=2, init=start or "default")
        config = dataclasses.replace(config, tune=TuneConfig(), adapter=adapter)
        weights |= adapters.init(config, weights)
    made = torch_ref.engine.Engine(config, weights, "cpu")
    attention: Any = F.scaled_dot_product_attention
    linear = F.linear
    products: list[int] = []

    def attention_spy(*heads: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        assert all(each.is_contiguous() for each in heads), [each.stride() for each in heads]
        return attention(*heads, **kwargs)

    def linear_spy(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        assert x.ndim == 2 and weight.is_contiguous(), (x.shape, weight.stride())
        products.append(x.ndim)
        return linear(x, weight, bias)

    def no_product(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        assert x.ndim == y.ndim, f"a product of {tuple(x.shape)} and {tuple(y.shape)}"
        return x.matmul(y)

    monkeypatch.setattr(F, "scaled_dot_product_attention", attention_spy)
    monkeypatch.setattr(F, "linear", linear_spy)
    monkeypatch.setattr(torch.Tensor, "__matmul__", no_product)
    mps.watch()
    with Log() as log:
        assert made.train_step(1, [batch(config, 1)], 1e-3).finite
    assert mps.waits == ["numpy"] and len(products) > 8
    with Log() as other:
        made.evaluate(batch(config, 1))
        generate(made.model, None, [[1, 2, 3], [4]], SampleConfig(max_tokens=3, **EVERY), bias={5: 1.0}, top=3)
    assert torch.float64 not in log.dtypes | other.dtypes


@pytest.mark.parametrize(("exact", "expected"), [(True, "cpu"), (False, "mps")])
def test_float64_is_computed_on_the_cpu_where_mps_is_the_device(
    exact: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(folder: str, device: str) -> None:
        raise LookupError(device)

    monkeypatch.setattr(torch_ref.probe.devices, "use", lambda _: torch.device("mps"))
    monkeypatch.setattr(torch_ref.probe, "load", load)
    with pytest.raises(LookupError, match=expected):
        list(torch_ref.probe.probe("nowhere", Request(np.arange(4), exact=exact), "mps"))


# operations that torch.use_deterministic_algorithms documents as raising on CUDA (2.13), by the kernels' names
RAISES = (
    "cumsum", "histc", "bincount", "median", "nanmedian", "put", "nll_loss2d", "ctc_loss", "_ctc_loss", "max_unpool",
    "avg_pool3d_backward", "adaptive_", "fractional_max_pool", "upsample_", "reflection_pad", "embedding_bag",
    "_embedding_bag", "grid_sampler", "scatter_reduce", "kthvalue",
)  # fmt: skip


@pytest.mark.parametrize("name", ["gpt2-untied", "gemma2"])
def test_nothing_that_raises_in_cudas_deterministic_mode_is_used(
    name: str, cuda: Gpu, deterministic: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fast, "has_triton", lambda: False)  # FlexAttention's kernels add in one order
    train = {"dropout": 0.1} if name == "gpt2-untied" else {}
    config = case(name, "muon", loss_chunk=32, label_smoothing=0.1, z_loss=1e-3, compile="off", **train)
    made = engine("torch_ref", config)
    with Log() as log:
        made.train_step(1, [packed(config, 1)], 1e-3)
        made.evaluate(packed(config, 1))
        generate(made.model, None, [[1, 2, 3], [4]], SampleConfig(max_tokens=3, **EVERY), bias={5: 1.0}, top=3)
    used = set(log.names)
    assert {each for each in used if each.removesuffix("_").startswith(RAISES)} == set() and len(used) > 50


def test_top_p_without_cumsum_drops_the_same_tokens(cuda: Gpu, deterministic: None) -> None:
    logits = torch.from_numpy(np.random.default_rng(2).normal(size=(40, 1000)).astype(np.float32)) * 3
    made = {p: keep(logits, SampleConfig(top_p=p)) for p in (0.1, 0.5, 0.9, 0.999)}
    agree("sums", fast.running_sums(logits.exp()).numpy(), logits.exp().double().cumsum(-1).numpy(), 1e-6)
    torch.use_deterministic_algorithms(False)
    for p, found in made.items():
        assert (found == keep(logits, SampleConfig(top_p=p))).all(), p


@pytest.mark.filterwarnings("ignore")  # torch.compile's own, which as errors end it
def test_steps_of_other_sizes_and_rates_are_not_compiled_each() -> None:
    """Unequal micro-batches, lengths and rates, head in chunks: one graph, and one for sizes that vary."""
    counter, plain = CompileCounterWithBackend("eager"), torch.compile
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", lambda function: plain(function, backend=counter))
        patch.setattr(TrainConfig, "head_chunk", lambda _, tokens, *rest: 4000 // tokens)  # as a GPU's, by size
        torch._dynamo.reset()
        config = dataclasses.replace(recipe(compile="on"), model=tiny(family="gpt2", n_layer=1))
        made = engine("torch_ref", config)
        for step, (rows, length) in enumerate([(6, 32), (4, 32), (2, 20), (3, 31)], 1):
            whole = batch(config, step)
            tokens, targets, weights = (each[:, :length] for each in (whole.tokens, whole.targets, whole.weights))
            made.train_step(step, Batch(tokens, targets, weights).split(rows), 1e-3 / step)
    torch._dynamo.reset()
    assert counter.frame_count <= 3  # rows vary first, then lengths


def test_what_is_compiled_is_decided_by_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function: function)
    found = {}
    for kind in ("cpu", "mps", "cuda"):
        monkeypatch.setattr(fast, "kind", lambda _, kind=kind: kind)
        made = engine("torch_ref", case("gpt2"))
        found[kind] = (made.compiled, made.fused)
    assert found == {"cpu": (False, False), "mps": (False, False), "cuda": (True, True)}


def test_a_mac_needs_the_first_release_whose_causal_attention_is_right() -> None:
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
    wanted = [Requirement(each) for each in project["optional-dependencies"]["torch"]]
    for system, release, good in (("darwin", "2.12.1", False), ("darwin", "2.13.0", True), ("linux", "2.9.0", True)):
        here = [each for each in wanted if each.marker is None or each.marker.evaluate({"sys_platform": system})]
        assert here and all(each.specifier.contains(release) for each in here) == good, (system, release)


def test_a_model_decodes_with_cuda_kernels_as_without(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache and left padding take no blocks."""
    torch.manual_seed(0)
    model = Model(CASES["gemma2"])
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    sample, prompts = SampleConfig(temperature=0.0, max_tokens=8), [[1, 2, 3, 4, 5], [6, 7]]
    expected = [each.tokens for each in generate(model, None, prompts, sample)]
    Gpu("cuda", monkeypatch)
    assert [each.tokens for each in generate(model, None, prompts, sample)] == expected


def test_a_product_with_a_transposed_matrix_gets_a_copy_of_it_on_mps(mps: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """bfloat16 with a transposed matrix aborts the process there (PyTorch 2.13, macOS 27)."""
    x, weight, linear = torch.randn(2, 3, 5), torch.randn(5, 4).T, F.linear
    seen: list[tuple[int, bool]] = []

    def spy(x: torch.Tensor, weight: torch.Tensor, bias: None) -> torch.Tensor:
        seen.append((x.ndim, weight.is_contiguous()))
        return linear(x, weight, bias)

    monkeypatch.setattr(F, "linear", spy)
    agree("product", fast.linear(x, weight).numpy(), linear(x, weight).numpy(), 1e-6)
    assert seen == [(2, True)]
