"""yarn, dynamic and longrope against transformers, within and beyond the original context, every way through a model.

In one pass, token by token with a cache, behind padding, packed, and in generation, where a sequence grows over the
border. The parity ladder (VARIANTS of models.py) has gradients and whole curves, tests/hub.py configs of the hub.
"""

import functools
import itertools
import math
from typing import Any

import ladder
import mlx.core as mx
import numpy as np
import pytest
import torch
import transformers
from arriving import TOKENS
from compare import agree
from models import DYNAMIC, LONG, LONGROPE, VARIANTS, YARN, tiny, weights

import mlxgpt.generate
import mlxgpt.model
import torch_ref.generate
import torch_ref.model
from mlxgpt.common.config import SampleConfig
from mlxgpt.common.data import token_source
from mlxgpt.common.errors import UserError
from mlxgpt.common.model import families, rotary
from mlxgpt.common.sft import pack
from mlxgpt.common.sft.pack import Example

CASES = [name for name, config in VARIANTS.items() if config.rope_scaling in ("yarn", "dynamic", "longrope")]
BY_LENGTH = [name for name in CASES if rotary.by_length(VARIANTS[name])]


@functools.cache
def trio(case: str) -> tuple[Any, mlxgpt.model.Model, torch_ref.model.Model]:
    """One model in transformers, MLX and torch."""
    config = VARIANTS[case]
    made = weights(config, scale=4.0)
    values = families.config_to_hf(config) | {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
    kind = str(values.pop("model_type"))
    theirs: Any = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(kind, **values))
    names = {
        foreign.replace("embed_out", "lm_head"): name for foreign, (name, _) in families.from_foreign(config).items()
    }
    state = {foreign: torch.from_numpy(np.array(made[name])) for foreign, name in names.items()}
    missing = theirs.load_state_dict(state, strict=False).missing_keys
    assert set(missing) <= {"lm_head.weight"}
    theirs.tie_weights()
    ours = mlxgpt.model.Model(config)
    ours.update(ladder.tree_unflatten([(name, mx.array(value)) for name, value in made.items()]))
    return theirs.eval(), ours, ladder.torch_model(config, made, torch.float32)


def fresh(theirs: Any) -> Any:
    """``theirs`` as it was before it saw a long sequence, whose frequencies it keeps."""
    embedding = getattr(theirs, theirs.base_model_prefix).rotary_emb
    embedding.inv_freq, embedding.max_seq_len_cached = (
        embedding.original_inv_freq.clone(),
        embedding.original_max_seq_len,
    )
    return theirs


def theirs_of(case: str, tokens: np.ndarray, **more: Any) -> np.ndarray:
    with torch.no_grad():
        return fresh(trio(case)[0])(torch.from_numpy(tokens), **more).logits.numpy()


def ours_of(case: str, tokens: np.ndarray, **more: Any) -> dict[str, np.ndarray]:
    """Logits of both frameworks; ``more`` are arrays that a call takes."""
    _, ours, other = trio(case)
    with torch.no_grad():
        torches = {name: torch.from_numpy(value) for name, value in more.items()}
        found = other(torch.from_numpy(tokens), **torches).numpy()
    mlxes: dict[str, Any] = {name: mx.array(value) for name, value in more.items()}
    return {"MLX": np.array(ours(mx.array(tokens), **mlxes)), "torch": found}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("beyond", [-4, 0, 1, 24])
def test_logits_are_transformers_own_up_to_the_border_and_beyond(case: str, beyond: int) -> None:
    tokens = TOKENS[:, : VARIANTS[case].rope_original + beyond]
    for who, found in ours_of(case, tokens).items():
        agree(f"{case}, {who}", found, theirs_of(case, tokens), 2e-5)


@pytest.mark.parametrize("case", CASES)
def test_a_cache_keeps_the_keys_as_they_were_turned(case: str) -> None:
    """A call turns its own tokens by the length so far; those before stay, as in transformers."""
    (theirs, ours, other), border = trio(case), VARIANTS[case].rope_original
    sizes = [border - 3, *[1] * 6, 5]
    caches: list[Any] = [transformers.DynamicCache(), mlxgpt.model.make_cache(ours, 2, 64)]
    caches.append(torch_ref.model.make_cache(other, 2, 64))
    fresh(theirs)
    start = 0
    for size in sizes:
        tokens = TOKENS[:, start : start + size]
        start += size
        with torch.no_grad():
            expected = theirs(torch.from_numpy(tokens), past_key_values=caches[0]).logits.numpy()
            found = other(torch.from_numpy(tokens), cache=caches[2]).numpy()
        agree(f"MLX, {start} tokens", np.array(ours(mx.array(tokens), cache=caches[1])), expected, 2e-5)
        agree(f"torch, {start} tokens", found, expected, 2e-5)


@pytest.mark.parametrize("case", BY_LENGTH)
def test_padding_on_the_left_does_not_count_and_rows_do_not_share_a_length(case: str) -> None:
    border = VARIANTS[case].rope_original
    lengths = [border + 6, border]
    width, pad = max(lengths), np.array([max(lengths) - each for each in lengths])
    tokens = np.where(np.arange(width) >= pad[:, None], np.roll(TOKENS[:, :width], pad[1], axis=1), 0)
    positions = np.maximum(np.arange(width) - pad[:, None], 0)
    for who, found in ours_of(case, tokens, positions=positions, pad=pad).items():
        for row, length in enumerate(lengths):
            alone = theirs_of(case, tokens[row : row + 1, pad[row] :])
            agree(f"{case}, {who}, {length} tokens", found[row : row + 1, pad[row] :], alone, 2e-5)


@pytest.mark.parametrize("case", BY_LENGTH)
def test_packed_texts_have_the_lengths_that_they_have_alone(case: str) -> None:
    border = VARIANTS[case].rope_original
    sizes = [border + 1, border - 2, 5]
    segments = np.repeat([1, 2, 3], sizes)[None]
    positions = np.concatenate([np.arange(size) for size in sizes])[None]
    places = np.cumsum([0, *sizes])
    tokens = TOKENS[:1, : sum(sizes)]
    more = {"positions": positions, "segments": segments}
    for who, found in ours_of(case, tokens, **more).items():
        for start, stop in itertools.pairwise(places):
            alone = theirs_of(case, tokens[:, start:stop])
            agree(f"{case}, {who}, {stop - start} tokens", found[:, start:stop], alone, 2e-5)


@pytest.mark.parametrize("case", [*BY_LENGTH, "qwen2-yarn-window"])
def test_generation_crosses_the_border_as_transformers_does(case: str) -> None:
    """dynamic: old keys stay; longrope: all is read anew with the long factors. A batch gives what each row gives."""
    theirs, ours, other = trio(case)
    border = VARIANTS[case].rope_original
    prompts = [TOKENS[0, : border - 6].tolist(), TOKENS[1, : border - 2].tolist(), TOKENS[0, 3 : border + 6].tolist()]
    sample = SampleConfig(temperature=0.0, max_tokens=12)
    expected = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        drawn = fresh(theirs).generate(ids, do_sample=False, max_new_tokens=12, attention_mask=torch.ones_like(ids))
        expected.append(drawn[0, len(prompt) :].tolist())
    pairs: list[tuple[Any, Any]] = [(mlxgpt.generate, ours), (torch_ref.generate, other)]
    for package, model in pairs:
        assert [each.tokens for each in package.generate(model, None, prompts, sample)] == expected
        assert [package.generate(model, None, [each], sample)[0].tokens for each in prompts] == expected


def test_a_long_prompt_has_one_length_in_all_its_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    sample = SampleConfig(temperature=0.0, max_tokens=6)
    prompts = [TOKENS[0, :40].tolist()]
    for case in BY_LENGTH:
        pairs: list[tuple[Any, Any]] = list(zip((mlxgpt.generate, torch_ref.generate), trio(case)[1:], strict=True))
        for package, model in pairs:
            whole = package.generate(model, None, prompts, sample)[0].tokens
            with monkeypatch.context() as patch:
                patch.setattr(package, "PREFILL", 7)
                assert package.generate(model, None, prompts, sample)[0].tokens == whole


@pytest.mark.parametrize("package", ["mlxgpt", "torch_ref"])
def test_padding_on_the_right_counts_neither_in_scores_nor_in_classes(package: str) -> None:
    case, border = "phi3-longrope", VARIANTS["phi3-longrope"].rope_original
    generate: Any = {"mlxgpt": mlxgpt.generate, "torch_ref": torch_ref.generate}[package]
    model: Any = trio(case)[1 + (package == "torch_ref")]
    examples = [
        Example("row 1", ids, ids, np.ones(len(ids), np.float32)) for ids in (TOKENS[0, :9], TOKENS[1, :border])
    ]
    whole = pack.padded_batch(examples, [(0,), (1,)], 64, placed=True)
    assert whole.tokens.shape[1] > border
    found = generate.score(model, whole.tokens, whole.targets, whole.positions)
    for row, example in enumerate(examples):
        alone = generate.score(model, example.tokens[None], example.targets[None])
        agree(f"{package}, row {row}", found[row : row + 1, : len(example)], alone, 1e-5)
    lengths = np.array([len(example) for example in examples])
    ends = generate.classify(model, whole.tokens, lengths)
    for row, example in enumerate(examples):
        alone = generate.classify(model, example.tokens[None], lengths[row : row + 1])
        agree(f"{package}, class of row {row}", ends[row : row + 1], alone, 1e-5)


def test_windows_say_where_a_text_ends() -> None:
    batch = next(token_source.windows(np.arange(12), 32, 2))
    assert batch.positions is not None and batch.positions.max() == 10 and not batch.positions[0, 11:].any()


def test_a_sequence_beyond_the_context_is_refused() -> None:
    with pytest.raises(UserError, match="65 tokens: the model's context holds 64"):
        ours_of("llama-dynamic", np.zeros((1, 65), np.int32))


ATTENTION = [
    ({}, 0.1 * math.log(4) + 1, 0.0),
    ({"attention_factor": 1.25}, 1.25, 1.25),
    ({"mscale": 0.7, "mscale_all_dim": 1.0}, (0.07 * math.log(4) + 1) / (0.1 * math.log(4) + 1), None),
    ({"mscale": 0.7}, 0.1 * math.log(4) + 1, 0.0),
    ({"attention_factor": 0.1 * math.log(4) + 1}, 0.1 * math.log(4) + 1, 0.0),
]


@pytest.mark.parametrize(("keys", "expected", "field"), ATTENTION)
def test_what_multiplies_cos_and_sin_of_yarn(keys: dict[str, Any], expected: float, field: float | None) -> None:
    table = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16} | keys
    config = families.config_from_hf(families.config_to_hf(VARIANTS["llama-yarn"]) | {"rope_scaling": table})
    assert rotary.attention(config) == pytest.approx(expected, rel=1e-12)
    assert config.rope_attention == (rotary.attention(config) if field is None else field)
    assert families.config_from_hf(families.config_to_hf(config)) == config


def test_the_context_is_what_scaling_makes_of_the_original_one() -> None:
    """As pages of models say it: yarn is added and max_position_embeddings stays; transformers has no limit at all."""
    values = families.config_to_hf(tiny(family="qwen2", block_size=32))
    for table in ({"factor": 4.0, "original_max_position_embeddings": 32}, {"factor": 4.0}, {"factor": None}):
        config = families.config_from_hf(values | {"rope_scaling": {"type": "yarn"} | table})
        assert (config.rope_original, config.block_size) == (32, 128 if table["factor"] else 32)
    config = families.config_from_hf(values | {"rope_scaling": {"type": "dynamic", "factor": 2.5}})
    assert (config.rope_original, config.block_size) == (32, 80)
    assert families.config_to_hf(config)["max_position_embeddings"] == 32


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (YARN | {"rope_low": 2.0}, "model.rope_low = 2.0: expected 1.0 where model.rope_scaling = yarn"),
        (DYNAMIC | {"rope_attention": 1.5},
         "model.rope_attention = 1.5: expected 0.0 where model.rope_scaling = dynamic"),
        (LONGROPE | {"rope_long": [1.0]},
         "model.rope_long = (1.0,): expected 3 positive numbers, one a pair of rotary_dim"),
        (LONGROPE | {"rope_short": [1.0, -2.0, 3.0]},
         "model.rope_short = (1.0, -2.0, 3.0): expected 3 positive numbers, one a pair of rotary_dim"),
        ({"rope_short": [1.0]}, "model.rope_short = (1.0,): expected () where model.rope_scaling = none"),
        (DYNAMIC | {"rotary_dim": 2}, "model.rotary_dim = 2: expected 4 or more where model.rope_scaling = dynamic"),
        ({"rope_scaling": "ntk"},
         "model.rope_scaling = 'ntk': expected one of none, linear, llama3, yarn, dynamic, longrope"),
    ],
)  # fmt: skip
def test_settings_that_say_nothing_are_refused(model: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        tiny(family="phi3", **LONG, **model)
    assert str(caught.value) == message
