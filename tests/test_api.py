"""The public API beside the Trainer: new, models that are called with anything, dropout, print, generate."""

import copy
import dataclasses
import importlib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ladder
import mlx.core as mx
import mlx.nn
import numpy as np
import pytest
import tokenizers
import torch
from compare import agree
from mlx.utils import tree_flatten
from models import CASES, tiny, weights

import mlxgpt.api
import mlxgpt.engine
import mlxgpt.generate
import mlxgpt.load
import mlxgpt.model
import torch_ref.api
import torch_ref.load
from mlxgpt.common.batch import Batch
from mlxgpt.common.config import ModelConfig, Recipe
from mlxgpt.common.errors import UserError
from mlxgpt.common.folders import model_folder
from mlxgpt.common.model import params
from mlxgpt.common.recipes import build
from mlxgpt.common.tokenizers.char import CharTokenizer

SIZES: dict[str, Any] = dict(n_layer=2, n_head=2, n_embd=16, block_size=8, vocab_size=11)
APIS: dict[str, Any] = {"mlx": mlxgpt.api, "torch": torch_ref.api}
BOTH = pytest.mark.parametrize("api", APIS.values(), ids=APIS)
TOKENS = np.array([[1, 2, 3, 10], [0, 4, 0, 7]])


def host(array: Any) -> np.ndarray:
    """Either framework's array as numpy."""
    return ladder.host(array.detach()) if isinstance(array, torch.Tensor) else np.array(array)


def native(api: Any, given: Any) -> Any:
    """The framework's own array."""
    return mx.array(given) if api is mlxgpt.api else torch.tensor(given)


def arrays_of(model: Any) -> dict[str, np.ndarray]:
    """The weights by name."""
    if isinstance(model, torch.nn.Module):
        return {name: host(each) for name, each in model.named_parameters()}
    return {name: np.array(each) for name, each in tree_flatten(model.parameters())}


def test_both_apis_have_the_same_names_and_arguments() -> None:
    import inspect

    assert mlxgpt.api.__all__ == torch_ref.api.__all__
    for name in ("load", "new", "generate", "Trainer"):
        one, other = (list(inspect.signature(getattr(api, name)).parameters) for api in APIS.values())
        assert one == other


def test_the_modules_of_these_names_stay() -> None:
    for package in ("mlxgpt", "torch_ref"):
        api = importlib.import_module(f"{package}.api")
        assert importlib.import_module(f"{package}.load").load is api.load
        assert callable(importlib.import_module(f"{package}.generate").generate)


def test_import_mlxgpt_loads_no_framework_and_no_numpy() -> None:
    heavy = "{'numpy', 'mlx', 'torch', 'rich', 'safetensors'}"
    code = f"import sys, mlxgpt; print({heavy} & {{name.split('.')[0] for name in sys.modules}} or 'light')"
    run = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent.parent, capture_output=True, text=True)
    assert run.stdout == "light\n", run.stderr


@pytest.mark.parametrize("case", ["gpt2", "llama-gqa", "gemma2", "qwen3-untied"])
def test_new_models_are_equal_bit_for_bit_and_start_as_a_run_does(case: str) -> None:
    one, other = (arrays_of(api.new(CASES[case], 5, device="cpu")) for api in APIS.values())
    expected = params.init_params(CASES[case], 5)
    assert one.keys() == other.keys() == expected.keys()
    for name, value in expected.items():
        assert one[name].tobytes() == other[name].tobytes() == value.tobytes(), name
    assert any((arrays_of(mlxgpt.api.new(CASES[case], 6))[name] != value).any() for name, value in one.items())


@BOTH
def test_a_model_that_is_made_by_hand_has_weights_too(api: Any) -> None:
    config = tiny(family="gpt2")
    module = importlib.import_module(api.__name__.replace("api", "model"))
    made, expected = arrays_of(module.Model(config)), params.init_params(config, 1337)
    assert all((made[name] == value).all() for name, value in expected.items())
    assert not any(value.any() for value in arrays_of(module.Model(config, seed=None)).values())


@BOTH
def test_a_dict_becomes_what_its_family_implies(api: Any) -> None:
    made = api.new({"family": "llama", **SIZES}, device="cpu").config
    assert made == build({"model": {"family": "llama", **SIZES}}).model and made.norm == "rms"


@BOTH
@pytest.mark.parametrize(
    ("config", "settings", "message"),
    [
        ({**SIZES, "vocab_size": 0}, {}, "model.vocab_size = 0: expected the number of tokens"),
        ({**SIZES, "n_layers": 2}, {}, "config: unknown key model.n_layers (did you mean 'n_layer'?)"),
        ({**SIZES, "n_embd": 15}, {}, "model.n_embd = 15: expected a multiple of model.n_head = 2"),
        ({**SIZES, "family": "gtp2"}, {}, "config: model.family = 'gtp2': expected one of "),
        (SIZES, {"dropout": 1.0}, "dropout = 1.0: expected a number of at least 0 and below 1"),
        (SIZES, {"seed": None}, "seed = None: expected a whole number, 0 or more"),
        (SIZES, {"seed": -1}, "seed = -1: expected a whole number, 0 or more"),
        (SIZES, {"dtype": "float16"}, "dtype = 'float16': expected float32 or bfloat16"),
        (SIZES, {"device": "tpu"}, "--device tpu: "),
    ],
)
def test_new_refuses_in_one_line(api: Any, config: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        api.new(config, **settings)
    assert message in str(error.value) and "\n" not in str(error.value)


@BOTH
def test_tokens_of_any_kind_mean_the_same(api: Any) -> None:
    model = api.new(SIZES, device="cpu")
    expected = host(model(native(api, TOKENS.astype(np.int32))))
    other = torch.tensor(TOKENS) if api is mlxgpt.api else mx.array(TOKENS)
    narrow = [TOKENS.astype(kind) for kind in (np.uint8, np.uint16, np.int16, np.int64, np.uint64)]
    for given in (TOKENS.tolist(), tuple(map(tuple, TOKENS)), *narrow, native(api, TOKENS.astype(np.uint8)), other):
        assert (host(model(given)) == expected).all()


WRONG: list[tuple[Any, str]] = [
    ([1, 2, 3], "tokens have shape (3,): expected (B, T), rows of token ids: tokens[None] makes one row of them"),
    ([[[1]]], "tokens have shape (1, 1, 1): expected (B, T), rows of token ids"),
    (3, "tokens have shape (): expected (B, T), rows of token ids"),
    ([[1.0, 2.0]], "expected integers, which token ids are"),
    ([[True, False]], "tokens are bool: expected integers"),
    (np.zeros((0, 4), np.int64), "tokens have shape (0, 4): expected at least one row and one token in it"),
    (np.zeros((2, 0), np.int64), "tokens have shape (2, 0): expected at least one row and one token in it"),
    ([[1, 2, 11]], "tokens[0, 2] = 11: expected 0 to 10, the model's vocabulary"),
    ([[1, 2], [3, -1]], "tokens[1, 1] = -1: expected 0 to 10, the model's vocabulary"),
    ([[1] * 9], "9 tokens: the model's context holds 8"),
]


@BOTH
@pytest.mark.parametrize(("given", "message"), WRONG)
@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
def test_wrong_tokens_are_one_line_on_the_host_and_as_arrays(
    api: Any, given: Any, message: str, training: bool
) -> None:
    model = api.new(SIZES, device="cpu").train(training)
    for tokens in (given, native(api, given)):
        with pytest.raises(UserError) as error:
            model(tokens)
        assert message in str(error.value) and "\n" not in str(error.value)


@BOTH
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([[1, 2], [3]], "tokens: rows of different lengths: expected (B, T)"),
        ([["a", "b"]], "expected integers"),
        (np.array([[2**31 + 1]]), "tokens[0, 0] = 2147483649: expected 0 to 10"),  # 1, if it were cut to 32 bits
        (torch.ones((1, 2), requires_grad=True), "tokens"),
    ],
)
def test_what_no_framework_takes_is_one_line(api: Any, given: Any, message: str) -> None:
    with pytest.raises(UserError) as error:
        api.new(SIZES, device="cpu")(given)
    assert message in str(error.value) and "\n" not in str(error.value)


@BOTH
def test_a_loaded_model_refuses_an_id_outside_its_vocabulary(api: Any, tmp_path: Path) -> None:
    model_folder.write_model(tmp_path / "m", CASES["llama"], weights(CASES["llama"]))
    for place in (tmp_path / "m", str(tmp_path / "m")):
        model, tokenizer = api.load(place, device="cpu")
        assert tokenizer is None and model.checks and not model.training
        with pytest.raises(UserError, match=r"tokens\[0, 1\] = 80: expected 0 to 79, the model's vocabulary"):
            model(native(api, [[1, 80]]))
    model.checks = False
    model(native(api, [[1, 2]]))


def test_what_mlx_compiles_reads_no_other_memory() -> None:
    """Tokens have no values there: an id that is missing makes its row NaN, and no other."""
    take = mx.compile(lambda tokens: mlxgpt.model.inputs.taken(tokens, 11, True))
    tokens, inside = take(mx.array([[1, 2, 3, 10], [0, 99, 0, -1]]))
    assert tokens.tolist() == [[1, 2, 3, 10], [0, 0, 0, 0]]
    assert inside is not None and inside.tolist() == [[True] * 4, [True, False, True, False]]
    model = mlxgpt.api.new(SIZES, device="cpu")
    logits = np.array(model.head(model.hidden(tokens, inside=inside)))
    assert (logits[0] == np.array(model([[1, 2, 3, 10]]))[0]).all() and np.isnan(logits[1]).all()


def test_a_gpu_waits_for_no_id_in_training_nor_while_tokens_are_drawn(
    metal: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    real = mlxgpt.model.inputs.ids.check
    monkeypatch.setattr(mlxgpt.model.inputs.ids, "check", lambda *args: read.append(1) or real(*args))
    model = mlxgpt.api.new(SIZES, device="gpu")
    bad = mx.array([[1, 99]])
    assert np.isnan(np.array(model(bad))).all() and not read
    model.eval()
    with pytest.raises(UserError, match="= 99"):
        model(bad)
    cache = mlxgpt.model.make_cache(model, 1, 8)
    model(mx.array([[1, 2]]), cache=cache)
    assert len(read) == 2
    assert np.isfinite(np.array(model(mx.array([[3]]), cache=cache))).all()
    assert np.isnan(np.array(model(mx.array([[99]]), cache=cache))).all() and len(read) == 2
    with pytest.raises(UserError, match="= 99"):  # what the host has costs the device nothing
        model([[99]], cache=cache)


@BOTH
def test_generation_and_steps_of_training_pass_no_check(api: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module(api.__name__.replace("api", "model"))
    model = api.new(SIZES, device="cpu")

    def refused(*_: Any) -> None:
        raise AssertionError("checked")

    monkeypatch.setattr(module.inputs, "taken", refused)
    assert len(api.generate(model, None, [1, 2], max_tokens=5).tokens) == 5
    engine = importlib.import_module(api.__name__.replace("api", "engine"))
    recipe = build({"model": SIZES})
    made = engine.Engine(recipe, params.init_params(recipe.model, 1), "cpu")
    assert made.train_step(1, [Batch(TOKENS, TOKENS, np.ones(TOKENS.shape, np.float32))], 1e-3).finite
    made.evaluate(Batch(TOKENS, TOKENS, np.ones(TOKENS.shape, np.float32)))


def losses_with_dropout(api: Any, calls: int, seed: int = 3) -> list[np.ndarray]:
    model = api.new({**SIZES, "n_embd": 32}, seed, device="cpu", dropout=0.3)
    return [host(model(TOKENS)) for _ in range(calls)]


def test_dropout_is_of_train_and_not_of_eval_and_draws_the_same_in_both() -> None:
    for api in APIS.values():
        model = api.new(SIZES, device="cpu", dropout=0.3)
        assert model.training and model.dropout == 0.3
        first, second = host(model(TOKENS)), host(model(TOKENS))
        still = host(model.eval()(TOKENS))
        assert np.abs(first - second).max() > 0.01 and np.abs(first - still).max() > 0.01
        assert (still == host(model(TOKENS))).all()
        plain = host(api.new(SIZES, device="cpu")(TOKENS))
        agree("without dropout", still, plain, 1e-6)
        assert np.abs(host(model.train()(TOKENS)) - still).max() > 0.01
        model.dropout = 0.3
        assert (host(model(TOKENS)) == first).all()  # from the first mask again
        model.dropout = 0
        agree("a rate of 0", host(model(TOKENS)), plain, 1e-6)
    for number, (one, other) in enumerate(zip(*(losses_with_dropout(api, 3) for api in APIS.values()), strict=True)):
        agree(f"call {number}", one, other, 1e-5)
    changed = losses_with_dropout(mlxgpt.api, 1, seed=4)[0]
    assert np.abs(changed - losses_with_dropout(mlxgpt.api, 1)[0]).max() > 0.01


@BOTH
def test_a_copy_is_a_model_of_its_own(api: Any) -> None:
    model = api.new(SIZES, device="cpu", dtype="bfloat16", dropout=0.1)
    other = copy.deepcopy(model)
    assert other.dtype is model.dtype and (host(other(TOKENS)) == host(model(TOKENS))).all()
    other.ln_f.weight = type(model.ln_f.weight)(0 * other.ln_f.weight)
    assert not host(other.eval()(TOKENS)).any() and host(model.eval()(TOKENS)).any()


@BOTH
def test_a_device_may_be_torchs_own(api: Any) -> None:
    assert api.new(SIZES, device=torch.device("cpu")).config.n_layer == 2


def test_a_compiled_step_of_mlx_draws_a_mask_a_step() -> None:
    def run(compiled: bool) -> list[list[int]]:
        model = mlxgpt.api.new(SIZES, device="cpu", dropout=0.3)

        def step() -> mx.array:
            drop = model.masks()
            assert drop
            return drop.keys

        call = mx.compile(step, inputs=[model.state], outputs=[model.state]) if compiled else step
        return [np.array(call()).tolist() for _ in range(3)]

    assert run(True) == run(False)
    assert len(set(map(str, run(True)))) == 3


@BOTH
def test_generation_drops_nothing_and_leaves_the_mode(api: Any) -> None:
    model = api.new(SIZES, device="cpu", dropout=0.5)
    greedy = api.generate(model, None, [1, 2], temperature=0, max_tokens=6)
    assert model.training
    model.dropout = 0.0
    assert greedy == api.generate(model.eval(), None, [1, 2], temperature=0, max_tokens=6)
    assert not model.training


@BOTH
def test_print_shows_sizes(api: Any) -> None:
    model = api.new({"family": "llama", **SIZES, "n_layer": 3, "n_kv_head": 1}, device="cpu", dropout=0.1)
    lines = str(model).splitlines()
    total = params.count(model.config)
    assert lines[0] == (
        f"llama: {total:,} parameters; 3 layers, width 16, 2 heads of 8, 1 of keys and values; context 8, vocabulary 11"
    )
    assert lines[1] == "weights float32, computes in float32; training mode, dropout 0.1"
    shown = "\n".join(lines)
    for part in ("wte.weight", "(11, 16)", "176", "h.0 to h.2, each", "attn.q_proj.weight", "ln_f.weight"):
        assert part in shown
    assert "h.1" not in shown and max(map(len, lines)) < 120
    assert "Linear(16, 16)" in str(model.h[0].attn)


def test_print_is_the_same_in_both_and_tells_changed_blocks_apart() -> None:
    one, other = (api.new(SIZES, device="cpu") for api in APIS.values())
    assert str(one) == str(other)
    one.h[1].mlp = mlx.nn.Linear(16, 16)
    other.h[1].mlp = torch.nn.Linear(16, 16)
    for model in (one, other):
        assert "h.0 " in str(model) and "h.1 " in str(model) and "mlp.weight" in str(model)


@BOTH
@pytest.mark.parametrize("case", ["lora", "quantized"])
def test_print_counts_what_trains_and_quantized_matrices(api: Any, case: str) -> None:
    section: dict[str, Any] = {"bits": 4, "group_size": 32, "dequantize": "never"} if case == "quantized" else {}
    model = {**SIZES, "n_embd": 32, "n_hidden": 64}
    recipe = build({"model": model, "tune": {}, "adapter": {"rank": 2, "targets": ["attn.c_attn"], **section}})
    from mlxgpt.common.model import adapters

    base = dict(params.init_params(recipe.model, 1))
    engine = importlib.import_module(api.__name__.replace("api", "engine")).Engine(
        recipe, base | adapters.init(recipe, base), "cpu"
    )
    own = sum(int(np.prod(param.shape)) for param in adapters.trainable(recipe).values())
    shown = str(engine.model)
    assert f"{params.count(recipe.model) + own:,} parameters, of which {own:,} train" in shown
    assert ("in 4 bits" in shown) == (case == "quantized")


@BOTH
def test_generate_takes_one_prompt_or_many(api: Any) -> None:
    model = api.new(SIZES, device="cpu")
    one = api.generate(model, None, [1, 2, 3], max_tokens=3, temperature=0)
    assert one.prompt_tokens == 3 and len(one.tokens) == 3
    for many in ([[1, 2, 3], [4]], (np.array([1, 2, 3]), [4])):
        first, second = api.generate(model, None, many, max_tokens=3, temperature=0)
        assert first == one and second.prompt_tokens == 1
    assert api.generate(model, None, np.array([[1, 2, 3]]), max_tokens=3, temperature=0) == [one]
    assert api.generate(model, None, native(api, [1, 2, 3]), max_tokens=3, temperature=0) == one
    assert api.generate(model, None, [], max_tokens=3) == []
    sample = api.SampleConfig(max_tokens=3, temperature=0.0)
    assert api.generate(model, None, [1, 2, 3], sample) == one
    assert len(api.generate(model, None, [1, 2, 3], sample, max_tokens=2).tokens) == 2
    assert api.generate(model, None, [1, 2, 3], sample, logit_bias={7: 100, np.int64(5): 90.0}).tokens == [7] * 3
    both = api.generate(model, None, [1, 2, 3], sample, logit_bias={7: 100, 5: 90}, presence_penalty=20)
    assert both.tokens == [7, 5, 7]


@BOTH
@pytest.mark.parametrize(
    ("prompts", "settings", "message"),
    [
        ("a text", {}, "prompt 1: text needs a tokenizer, and this model has none"),
        ([1, 11], {}, "prompt 1: token id 11; expected 0 to 10"),
        ([[1], []], {}, "prompt 2: empty; expected at least one token"),
        ([1.5], {}, "prompt 1: float64 of shape (1,): expected a text, or token ids as whole numbers"),
        ([[1], [2.5]], {}, "prompt 2: float64 of shape (1,)"),
        (7, {}, "prompt 1: int64 of shape (): expected a text, or token ids"),
        ([1] * 9, {}, "prompt 1: 9 tokens; expected at most model.block_size = 8"),
        ([1], {"max_token": 3}, "generate: unknown key sample.max_token (did you mean 'max_tokens'?)"),
        ([1], {"temperature": -1.0}, "sample.temperature = -1.0: expected 0 or a positive number"),
        ([1], {"sample": {"max_tokens": 3}}, "sample is a dict: expected a SampleConfig; keywords are its fields"),
        ([1], {"logit_bias": {11: 1}}, "logit_bias: token id 11; expected 0 to 10, the model's vocabulary"),
        ([1], {"frequency_penalty": float("nan")}, "sample.frequency_penalty = nan: expected a number between"),
        ([1], {"prompt": "x"}, "generate: prompt is given by itself, not as a setting"),
    ],
)
def test_generate_refuses_in_one_line(api: Any, prompts: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        api.generate(api.new(SIZES, device="cpu"), None, prompts, **settings)
    assert message in str(error.value) and "\n" not in str(error.value)


@BOTH
def test_generate_refuses_what_writes_no_text(api: Any) -> None:
    model = api.new(SIZES, device="cpu")
    labels = api.new(dataclasses.replace(ModelConfig(**SIZES), labels=("a", "b")), device="cpu")
    for one, tokenizer, message in (
        (labels, None, "generate: a classifier of 2 labels, which mlxgpt classify runs"),
        (model, tokenizers.Tokenizer(tokenizers.models.BPE()), "tokenizer is a Tokenizer: expected what load returns"),
        (None, model, "model is a NoneType: expected what load or new returns"),
    ):
        with pytest.raises(UserError) as error:
            api.generate(one, tokenizer, [1])
        assert message in str(error.value) and "\n" not in str(error.value)


@BOTH
def test_one_stop_text_is_not_taken_for_its_characters(api: Any) -> None:
    model, tokenizer = api.new(SIZES, device="cpu"), CharTokenizer("abcdefghijk")
    text = api.generate(model, tokenizer, "a", max_tokens=6, seed=2).text
    assert len(set(text)) > 2
    assert api.generate(model, tokenizer, "a", max_tokens=6, seed=2, stop=text[3:5]).text == text[:3]
    assert api.generate(model, tokenizer, "a", max_tokens=6, seed=2, stop=text[4] + text[0] + "z").text == text


def test_an_objective_of_ones_own_is_the_engines() -> None:
    """As losses and gradients of the recipe's own, if it is the same; in validation too, where nothing is dropped."""
    recipe = build({"model": SIZES, "train": {"dropout": 0.2, "compile": "off"}})
    batch = Batch(TOKENS, np.roll(TOKENS, -1, 1), np.ones(TOKENS.shape, np.float32))
    for package in ("mlxgpt", "torch_ref"):
        engine = importlib.import_module(f"{package}.engine").Engine
        cross_entropy = importlib.import_module(f"{package}.api").cross_entropy
        seen: list[Any] = []

        def objective(model: Any, batch: Any, cross: Callable[..., Any] = cross_entropy, seen: Any = seen) -> Any:
            seen.append(model.training)
            return cross(model(batch.tokens), batch.targets)

        start: dict[str, Any] = dict(params.init_params(recipe.model, 1))
        own, plain = engine(recipe, start, "cpu", objective), engine(recipe, start, "cpu")
        for step in (1, 2):
            one, other = (each.train_step(step, [batch], 1e-2) for each in (own, plain))
            assert one.loss_sum == pytest.approx(other.loss_sum, rel=1e-6)
        assert own.evaluate(batch)["loss"] == pytest.approx(plain.evaluate(batch)["loss"], rel=1e-6)
        assert seen == [True, True, False] and own.model.training


@pytest.mark.parametrize("package", ["mlxgpt", "torch_ref"])
@pytest.mark.parametrize(("made", "found"), [("sum", "()"), ("rows", "(2,)"), ("number", "float")])
def test_an_objective_that_reduces_is_refused(package: str, made: str, found: str) -> None:
    def objective(model: Any, batch: Any) -> Any:
        losses = model(batch.tokens).sum(-1)
        return {"sum": losses.sum, "rows": lambda: losses.sum(-1), "number": lambda: 1.0}[made]()

    recipe = Recipe(model=ModelConfig(**SIZES))
    engine = importlib.import_module(f"{package}.engine").Engine(
        recipe, dict(params.init_params(recipe.model, 1)), "cpu", objective
    )
    batch = Batch(TOKENS, TOKENS, np.ones(TOKENS.shape, np.float32))
    with pytest.raises(UserError) as error:
        engine.train_step(1, [batch], 1e-3)
    assert f"objective returned {found}: expected losses of shape (2, 4)" in str(error.value)
