"""The search for what weights cannot say: it finds each choice, and claims no more than the sample tells."""

import dataclasses
import importlib
from typing import Any

import numpy as np
import pytest

from convert.adopt.evidence import Sample
from convert.adopt.proof import verdicts
from convert.adopt.proof.candidate import Limit, Weights, plain
from convert.adopt.proof.search import Found, search
from convert.adopt.reading.choices import pick
from convert.adopt.rules import Choice, Map, Option, Proposal
from convert.adopt.sets import settle
from mlxgpt.common.backend import PACKAGES
from mlxgpt.common.config import ModelConfig
from mlxgpt.common.model import params

BASE: dict[str, Any] = {
    "family": "mlxgpt", "n_layer": 2, "n_head": 4, "n_embd": 32, "vocab_size": 61, "block_size": 64, "tied": False,
    "position": "rope", "fused_qkv": False,
}  # fmt: skip


def choice(name: str, *values: Any) -> Choice:
    return Choice(name, tuple(Option(str(value), {name: value}) for value in values))


CHOICES = (
    choice("n_head", 4, 8, 2, 16),
    choice("activation", "gelu", "gelu_tanh", "relu", "silu"),
    choice("norm_eps", 1e-5, 1e-3, 1e-4),
    choice("placement", "pre", "post_add", "parallel2"),
    choice("rope_theta", 10000.0, 500000.0),
    choice("attn_scale", 0.0, 1.0),
    choice("embed_scale", False, True),
    choice("final_softcap", 0.0, 30.0, 15.0),
)
TRUE: dict[str, Any] = {
    "n_head": 2, "activation": "relu", "norm_eps": 1e-3, "placement": "post_add", "rope_theta": 500000.0,
    "attn_scale": 1.0, "embed_scale": True, "final_softcap": 15.0,
}  # fmt: skip


def made(fields: dict[str, Any]) -> ModelConfig:
    return ModelConfig(**{**BASE, **fields})


def trials(backend: str = "torch") -> Any:
    return importlib.import_module(f"{PACKAGES[backend]}.trial").Trials()


def weights_of(config: ModelConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """Weights that are no initial ones: every choice shows."""
    drawn = np.random.default_rng(seed)
    arrays = params.init_params(config, seed)
    return {
        name: array * 6 if array.ndim > 1 else array + drawn.normal(0, 0.1, array.shape).astype(np.float32)
        for name, array in arrays.items()
    }


def sample_of(config: ModelConfig, weights: Weights, tokens: int = 24, hidden: bool = False, **more: Any) -> Sample:
    ids = np.random.default_rng(1).integers(0, config.vocab_size, (1, tokens)).astype(np.int32)
    logits, states = trials().run(config, weights, ids, hidden)
    return Sample(ids, logits, tuple(states) if hidden else None, **more)


def run(
    weights: Weights, sample: Sample, choices: tuple[Choice, ...] = CHOICES, backend: str = "torch", base: Any = BASE,
    **more: Any,
) -> Found:  # fmt: skip
    return search(Proposal(Map((), base), choices), lambda _: weights, sample, trials(backend).run, **more)


@pytest.fixture(scope="module")
def true() -> tuple[ModelConfig, dict[str, np.ndarray]]:
    config = made(TRUE)
    return config, weights_of(config)


@pytest.mark.parametrize(("backend", "hidden"), [("torch", False), ("torch", True), ("mlx", False)])
def test_every_choice_is_found_and_proved(true: Any, backend: str, hidden: bool) -> None:
    config, weights = true
    found = run(weights, sample_of(config, weights, hidden=hidden), backend=backend)
    assert found.fits and found.error <= found.gate == 1e-5
    assert plain(found.config) == plain(config)
    assert {verdict.name: verdict.verdict for verdict in found.verdicts} == dict.fromkeys(TRUE, "proved")
    assert all(verdict.margin and verdict.margin > verdicts.CLEAR for verdict in found.verdicts)
    assert found.candidates < 1500  # of 4 x 4 x 3 x 3 x 2 x 2 x 2 x 3 = 3456


def test_what_the_sample_cannot_tell_is_undetermined_and_the_likeliest_taken() -> None:
    """One token sees itself alone; a window is not seen before it is full."""
    config = made({"n_head": 8, "activation": "silu"})
    weights = weights_of(config)
    choices = (choice("n_head", 4, 8, 2), choice("activation", "gelu", "silu"), choice("window", 0, 16, 2))
    found = run(weights, sample_of(config, weights, tokens=1), choices)
    told = {verdict.name: verdict for verdict in found.verdicts}
    assert found.fits and told["activation"].verdict == "proved"
    assert (told["n_head"].verdict, told["n_head"].value) == ("undetermined", "4")
    assert told["n_head"].options == ("4", "8", "2") and told["window"].options == ("0", "16", "2")

    found = run(weights, sample_of(config, weights, tokens=12), choices)
    told = {verdict.name: verdict for verdict in found.verdicts}
    assert told["n_head"].verdict == "proved" and told["n_head"].value == "8"
    assert told["window"].verdict == "undetermined" and told["window"].options == ("0", "16")
    assert "longer than the window" in told["window"].tell


def test_a_choice_that_does_nothing_in_the_model_is_idle() -> None:
    config = made({"position": "none"})
    weights = weights_of(config)
    choices = (choice("position", "rope", "none"), choice("rope_theta", 10000.0, 500000.0))
    found = run(weights, sample_of(config, weights), choices)
    assert [verdict.verdict for verdict in found.verdicts] == ["proved", "idle"]
    assert "rope_theta" not in found.map.model


def test_a_given_choice_is_kept_and_said(true: Any) -> None:
    config, weights = true
    left = tuple(each for each in CHOICES if each.name != "n_head")
    found = run(weights, sample_of(config, weights), (choice("n_head", 2), *left), given=["n_head"])
    assert found.verdicts[0] == verdicts.Verdict("n_head", "2", "given")
    wrong = run(weights, sample_of(config, weights), (choice("n_head", 4), *left), given=["n_head"])
    assert not wrong.fits and wrong.values[0] == "4"


def test_small_errors_that_hide_each_other_are_told_apart() -> None:
    """A cap of scores that changes almost nothing, and an eps that a wrong cap would pull elsewhere."""
    config = made({"norm_eps": 1e-6, "attn_scale": 0.05})
    weights = weights_of(config)
    choices = (choice("attn_softcap", 200.0, 0.0), choice("norm_eps", 1e-5, 1e-6, 1e-12))
    found = run(weights, sample_of(config, weights), choices, base=BASE | {"attn_scale": 0.05})
    for verdict, value in zip(found.verdicts, ("0.0", "1e-06"), strict=True):
        assert verdict.value == value or (verdict.verdict == "undetermined" and value in verdict.options)


def test_a_half_precision_sample_opens_the_gate_and_leaves_gelu_open() -> None:
    config = made({"activation": "gelu_tanh"})
    weights = weights_of(config)
    sample = sample_of(config, weights)
    half = dataclasses.replace(sample, logits=sample.logits.astype(np.float16).astype(np.float32), dtype="float16")
    choices = (choice("activation", "gelu", "gelu_tanh", "relu"), choice("n_head", 2, 4))
    found = run(weights, half, choices)
    assert found.fits and found.gate > 1e-4
    told = {verdict.name: verdict for verdict in found.verdicts}
    assert told["n_head"].verdict == "proved" and told["n_head"].value == "4"
    assert told["activation"].value == "gelu_tanh" or told["activation"].verdict == "undetermined"
    assert "relu" not in told["activation"].options


@pytest.mark.parametrize("hidden", [False, True])
def test_a_sample_of_other_weights_fits_nothing(true: Any, hidden: bool) -> None:
    config, weights = true
    found = run(weights, sample_of(config, weights_of(config, seed=5), hidden=hidden))
    assert not found.fits and not found.verdicts and found.error > 0.1
    assert ("the embeddings" if hidden else "the first token's logits already depart") in found.departs


def test_swapped_heads_are_refused_with_the_block(true: Any) -> None:
    config, weights = true
    d = config.head_dim
    name = "h.1.attn.q_proj.weight"
    swapped = dict(weights) | {name: np.concatenate([weights[name][d : 2 * d], weights[name][:d]])}
    found = run(swapped, sample_of(config, weights, hidden=True))
    assert not found.fits and found.departs.startswith("block 1 is the first that departs")
    blind = run(swapped, sample_of(config, weights))
    assert not blind.fits and "heads, positions, a window or the layout of q and k" in blind.departs


def test_a_missing_layer_is_refused(true: Any) -> None:
    config, _ = true
    deeper = dataclasses.replace(config, n_layer=3)
    weights = weights_of(deeper)
    cut = {name: array for name, array in weights.items() if not name.startswith("h.2.")}
    assert not run(cut, sample_of(deeper, weights)).fits


def test_the_search_ends_at_its_limit_and_says_so(true: Any) -> None:
    config, weights = true
    found = run(weights, sample_of(config, weights), limit=Limit(runs=30))
    assert found.runs < 80 and any("stopped at the limit of 30 runs" in note for note in found.notes)


def test_the_table_of_tokens_is_told_from_that_of_positions(true: Any) -> None:
    """Two tables of one width, of 61 and of 64 rows: an option takes the other one for the embeddings."""
    config = made({"position": "learned", "block_size": 64, "tied": True})
    weights = weights_of(config)
    swapped = weights | {"wte.weight": weights["wpe.weight"], "wpe.weight": weights["wte.weight"]}
    sizes = ({"vocab_size": 64, "block_size": 61}, {"vocab_size": 61, "block_size": 64})
    tables = Choice("embeddings", tuple(Option(str(n), each) for n, each in enumerate(sizes)))
    base = {**BASE, "position": "learned", "tied": True}
    found = search(
        Proposal(Map((), base), (tables,)),
        lambda each: weights if each.model["vocab_size"] == 61 else swapped,
        sample_of(config, weights), trials().run,
    )  # fmt: skip
    assert found.fits and found.values == ("1",)


def test_a_field_that_is_set_counts_in_every_option_of_a_choice() -> None:
    scalings = pick("rope_scaling", [("none", {"rope_scaling": "none", "rope_original": 8192}),
                                     ("llama3", {"rope_scaling": "llama3", "rope_original": 8192})])  # fmt: skip
    proposal, given = settle(Proposal(Map((), {}), (scalings,)), ["rope_scaling=llama3", "rope_original=32"])
    assert given == ["rope_scaling", "rope_original"] and len(proposal.choices[0].options) == 1
    assert proposal.choices[0].options[0].model == {"rope_scaling": "llama3", "rope_original": 32}
