"""Generation: cache against full forward pass, both frameworks against the specification, where text ends."""

import json
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import mlxgpt.generate as mlx_generate  # first: it loads a BLAS before MLX

# isort: split
import mlx.core as mx
import numpy as np
import pytest
import torch
from compare import agree, worst
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

import mlxgpt.load as mlx_load
import torch_ref.generate as torch_generate
import torch_ref.load as torch_load
from mlxgpt.common import recipes
from mlxgpt.common.config import ModelConfig, SampleConfig
from mlxgpt.common.errors import RunError, UserError
from mlxgpt.common.folders.model_folder import write_model
from mlxgpt.common.inference import generation, sampling
from mlxgpt.common.model import params
from mlxgpt.common.tokenizers.load import load_tokenizer, train_tokenizer
from mlxgpt.model import Model as MlxModel
from mlxgpt.model import make_cache as mlx_cache
from torch_ref.model import Model as TorchModel
from torch_ref.model import make_cache as torch_cache

FAMILIES = ("gpt2", "llama", "qwen3")
BACKENDS = ("mlx", "torch")
GENERATE: dict[str, ModuleType] = {"mlx": mlx_generate, "torch": torch_generate}
V, P = 61, 40


@pytest.fixture(autouse=True)
def cpu():
    before = mx.default_device()
    mx.set_default_device(mx.cpu)
    yield
    mx.set_default_device(before)


def make_config(family: str, vocab: int = V, **more: object) -> ModelConfig:
    heads = {} if family == "gpt2" else {"n_kv_head": 2}
    sizes = dict(n_layer=2, n_head=4, n_embd=32, block_size=P, vocab_size=vocab)
    return recipes.build({"model": {"family": family, **sizes, **heads, **more}}).model


def make_weights(sizes: ModelConfig, scale: float = 6.0) -> dict[str, np.ndarray]:
    """Scaled, so that the tokens depend on all of the model."""
    return {name: value * np.float32(scale) for name, value in params.init_params(sizes, 3).items()}


def make_model(backend: str, sizes: ModelConfig, scale: float = 6.0) -> Any:
    """The same weights for both."""
    weights = make_weights(sizes, scale)
    if backend == "mlx":
        model = MlxModel(sizes)
        model.load_weights([(name, mx.array(value)) for name, value in weights.items()])
        return model
    model = TorchModel(sizes)
    model.load_state_dict({name: torch.from_numpy(value) for name, value in weights.items()})
    return model


def logits_of(backend: str, model, tokens: list[list[int]], **more) -> np.ndarray:
    if backend == "mlx":
        return np.array(model(mx.array(tokens), **more))
    with torch.no_grad():
        return model(torch.tensor(tokens), **more).numpy()


def some_tokens(count: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, V, count).tolist()


# ---- rung 6: cached decoding and chunked prefill are the full forward pass


def in_chunks(backend: str, model, tokens: list[int], cuts: list[int]) -> np.ndarray:
    cache = (mlx_cache if backend == "mlx" else torch_cache)(model, 1, P)
    edges = [0, *cuts, len(tokens)]
    pieces = [logits_of(backend, model, [tokens[a:b]], cache=cache) for a, b in pairwise(edges)]
    assert cache[0].offset == len(tokens)
    return np.concatenate(pieces, axis=1)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_cache_is_the_full_forward_pass(backend: str, family: str) -> None:
    model, tokens = make_model(backend, make_config(family)), some_tokens(P)
    full = logits_of(backend, model, [tokens])
    agree("token by token", in_chunks(backend, model, tokens, list(range(1, P))), full, 1e-5)
    agree("chunks of unequal length", in_chunks(backend, model, tokens, [5, 6, 19, 36]), full, 1e-5)
    agree("last_only", logits_of(backend, model, [tokens], last_only=True), full[:, -1:], 1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_cache_check_sees_a_mask_aligned_to_the_wrong_corner(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = make_model(backend, make_config("llama")), some_tokens(P)
    full = logits_of(backend, model, [tokens])

    def upper_left(self, T, S, *_):
        mask = np.arange(S)[None, :] <= np.arange(T)[:, None]
        return mx.array(mask) if backend == "mlx" else torch.from_numpy(mask)

    monkeypatch.setattr(type(model), "mask", upper_left)
    assert worst("mutant", in_chunks(backend, model, tokens, [5, 20]), full) > 1e-2


@pytest.mark.parametrize("backend", BACKENDS)
def test_prefill_chunks_and_layout_do_not_change_the_tokens(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, sizes = GENERATE[backend], make_config("llama")
    prompts, sample = [some_tokens(21), some_tokens(9, 1)], SampleConfig(max_tokens=12)
    expected = module.generate(make_model(backend, sizes), None, prompts, sample)
    monkeypatch.setattr(module, "PREFILL", 4)
    assert module.generate(make_model(backend, sizes), None, prompts, sample) == expected
    model, plain = make_model(backend, sizes), make_model(backend, sizes)
    module.prepare(model)
    agree("prepared", logits_of(backend, model, prompts[:1]), logits_of(backend, plain, prompts[:1]), 1e-5)
    assert module.generate(model, None, prompts, sample) == expected


# ---- rung 7: both frameworks draw the tokens that the numpy specification draws

SAMPLES: list[dict[str, Any]] = [
    dict(temperature=0.0),
    dict(temperature=0.0, repetition_penalty=1.3),
    dict(temperature=1.0),
    dict(temperature=0.7, seed=5),
    dict(temperature=1.5, top_k=5),
    dict(temperature=1.5, top_k=V + 1),
    dict(temperature=1.5, top_p=0.8),
    dict(temperature=1.5, min_p=0.1),
    dict(temperature=1.0, repetition_penalty=1.4),
    dict(temperature=1.5, top_k=20, top_p=0.9, min_p=0.02, repetition_penalty=1.2, seed=9),
]


def oracle(model: TorchModel, prompt: list[int], sample: SampleConfig) -> list[int]:
    """Full forward passes, and numpy for the rest."""
    ids, seen = list(prompt), np.zeros((1, V), dtype=bool)
    for step in range(sample.max_tokens):
        seen[0, ids] = True
        logits = logits_of("torch", model, [ids])[:, -1]
        ids += sampling.sample_tokens(logits, seen, sampling.step_keys(sample.seed, [0], step), sample).tolist()
    return ids[len(prompt) :]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("options", SAMPLES, ids=str)
def test_both_frameworks_draw_what_the_specification_draws(family: str, options: dict) -> None:
    sizes, prompt, sample = make_config(family), some_tokens(7), SampleConfig(max_tokens=24, **options)
    expected = oracle(make_model("torch", sizes), prompt, sample)
    for backend in BACKENDS:
        found = GENERATE[backend].generate(make_model(backend, sizes), None, [prompt], sample)[0].tokens
        assert found == expected, backend


def test_every_option_changes_the_tokens() -> None:
    sizes, prompt = make_config("gpt2"), some_tokens(7)
    model = make_model("torch", sizes, scale=3.0)
    drawn = [
        oracle(model, prompt, SampleConfig(max_tokens=24, **options))
        for options in SAMPLES
        if options.get("top_k") != V + 1
    ]
    assert len(set(map(tuple, drawn))) == len(drawn)


@pytest.mark.parametrize("backend", BACKENDS)
def test_sampling_on_device_is_the_specification_over_many_rows(backend: str) -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(200, 301)).astype(np.float32) * 3
    logits[::2] -= 12  # rows in which all are negative, so that the penalty of those decides as well
    seen = rng.random(logits.shape) < 0.2
    keys = rng.integers(0, 2**32, len(logits), dtype=np.uint32)
    for options in SAMPLES:
        sample = SampleConfig(**options)
        if backend == "mlx":
            found = np.array(
                mlx_generate.sample_tokens(mx.array(logits), mx.array(seen.tolist()), mx.array(keys), sample)
            )
        else:
            arrays = (torch.from_numpy(logits), torch.from_numpy(seen), torch.from_numpy(keys.view(np.int32)))
            found = torch_generate.sample_tokens(*arrays, sample).numpy()
        assert np.array_equal(found, sampling.sample_tokens(logits, seen, keys, sample)), options


@pytest.mark.parametrize("backend", BACKENDS)
def test_noise_on_device_is_the_specification(backend: str) -> None:
    keys = np.array([0, 1, 2**31, 2**32 - 1], dtype=np.uint32)
    if backend == "mlx":
        found = np.array(mlx_generate.gumbel(mx.array(keys), 50_000))
    else:
        found = torch_generate.gumbel(torch.from_numpy(keys.view(np.int32)), 50_000).numpy()
    agree("gumbel", found, sampling.gumbel(keys, 50_000), 1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_ties_are_the_specifications(backend: str) -> None:
    logits = np.array([[0, 3, 1, 3, 1, 2], [5, 5, 5, 5, 5, 5]], dtype=np.float32)
    as_array = mx.array if backend == "mlx" else torch.from_numpy
    for sample in (SampleConfig(top_k=1), SampleConfig(top_k=4), SampleConfig(top_p=0.5), SampleConfig(min_p=1.0)):
        found = np.array(GENERATE[backend].keep(as_array(logits), sample).tolist())
        assert np.array_equal(found, sampling.keep(logits, sample)), sample
    keys = as_array(np.zeros(2, np.int32)) if backend == "torch" else mx.zeros(2, mx.uint32)
    drawn = GENERATE[backend].sample_tokens(as_array(logits), None, keys, SampleConfig(temperature=0.0))
    assert drawn.tolist() == [1, 0]


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_text_is_what_transformers_generates(family: str, tmp_path: Path) -> None:
    sizes, prompt = make_config(family), some_tokens(7)
    write_model(tmp_path / "m", sizes, make_weights(sizes))
    judge: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32)
    for penalty in (1.0, 1.4):
        options = {"do_sample": False, "max_new_tokens": 20, "min_new_tokens": 20, "pad_token_id": 0}
        ids = torch.tensor([prompt])
        found = judge.generate(ids, attention_mask=torch.ones_like(ids), repetition_penalty=penalty, **options)
        sample = SampleConfig(temperature=0.0, max_tokens=20, repetition_penalty=penalty)
        for backend in BACKENDS:
            ours = GENERATE[backend].generate(make_model(backend, sizes), None, [prompt], sample)[0].tokens
            assert ours == found[0, 7:].tolist(), (backend, penalty)


# ---- batches, context, errors


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_prompt_gets_in_a_batch_what_it_gets_alone(backend: str, family: str) -> None:
    """Prompts of 1 to P tokens: each ends where its own context ends, whatever its neighbours do."""
    model, generate = make_model(backend, make_config(family)), GENERATE[backend].generate
    prompts = [some_tokens(n, n) for n in (3, 17, 1, P, 30)]
    for sample in (SampleConfig(max_tokens=50), SampleConfig(max_tokens=50, temperature=0.0, repetition_penalty=1.2)):
        batch = generate(model, None, prompts, sample)
        assert batch == [generate(model, None, [prompt], sample)[0] for prompt in prompts]
        assert [len(result.tokens) for result in batch] == [P - len(prompt) + 1 for prompt in prompts]
        assert {result.finish_reason for result in batch} == {"context"}
        assert [result.prompt_tokens for result in batch] == [len(prompt) for prompt in prompts]


@pytest.mark.parametrize("backend", BACKENDS)
def test_copies_of_a_prompt_differ_and_seeds_differ(backend: str) -> None:
    model, generate = make_model(backend, make_config("llama"), scale=2.0), GENERATE[backend].generate
    a, b = some_tokens(3), some_tokens(4, 1)
    batch = generate(model, None, [a, b, a, a], SampleConfig(max_tokens=20))
    assert len({tuple(result.tokens) for result in batch}) == 4
    assert batch[0] == generate(model, None, [a], SampleConfig(max_tokens=20))[0]
    assert batch[0] != generate(model, None, [a], SampleConfig(max_tokens=20, seed=1))[0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_next_step_is_queued_before_a_token_is_read(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = make_config("llama")
    model, steps = make_model(backend, sizes), []
    draw = GENERATE[backend].sample_tokens
    monkeypatch.setattr(GENERATE[backend], "sample_tokens", lambda *args: (steps.append(0), draw(*args))[1])
    rows = generation.start_rows(sizes, None, [some_tokens(3)], ())
    tokens = GENERATE[backend].decode(model, rows, SampleConfig(max_tokens=3), V)
    counts = [len(steps) for _ in tokens]
    assert counts == [2, 3, 3]


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_tokens_asked_for(backend: str) -> None:
    model = make_model(backend, make_config("gpt2"))
    result = GENERATE[backend].generate(model, None, [[1, 2]], SampleConfig(max_tokens=0))[0]
    assert result == generation.Result("", [], 2, "length")
    assert GENERATE[backend].generate(model, None, [], SampleConfig()) == []


@pytest.mark.parametrize("backend", BACKENDS)
def test_logits_that_are_not_finite_stop_the_run(backend: str) -> None:
    sizes = make_config("gpt2")
    for bad in (float("nan"), float("inf")):
        model = make_model(backend, sizes)
        if backend == "mlx":
            model.ln_f.weight = mx.full((32,), bad)
        else:
            model.ln_f.weight.data.fill_(bad)
        with pytest.raises(RunError, match="prompt 1, token 1: the model's logits are not finite"):
            GENERATE[backend].generate(model, None, [[1, 2]], SampleConfig(max_tokens=5))


class Unused:
    """A model that must not be run."""

    def __init__(self) -> None:
        self.config = make_config("llama")


ERRORS = [
    ([some_tokens(P + 1)], (), "prompt 1: 41 tokens; expected at most model.block_size = 40"),
    ([[1], []], (), "prompt 2: empty; expected at least one token"),
    ([[1, V]], (), "prompt 1: token id 61; expected 0 to 60, the model's vocabulary"),
    ([[-1]], (), "prompt 1: token id -1; expected 0 to 60, the model's vocabulary"),
    (["text"], (), "prompt 1: text needs a tokenizer, and this model has none; expected token ids"),
    ([[1]], ("x",), "stop strings need a tokenizer, and this model has none"),
    ([[1]], ("",), "stop string '': expected at least one character"),
    ("text", (), "prompts = 'text': expected a list of prompts"),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("prompts, stop, message", ERRORS)
def test_wrong_prompts_are_refused_before_the_start(backend: str, prompts: object, stop: tuple, message: str) -> None:
    with pytest.raises(UserError) as caught:
        GENERATE[backend].generate(Unused(), None, prompts, SampleConfig(), stop)
    assert str(caught.value) == message


# ---- text

TEXT = "naive na\u00efve caf\u00e9 \u65e5\u672c\u8a9e \U0001f600 the cat sat on the mat, the end. " * 20


@pytest.fixture(scope="module")
def tokenizers():
    return {kind: train_tokenizer(kind, [TEXT], 310) for kind in ("char", "bpe", "sp-bpe")}


@pytest.mark.parametrize("kind", ["char", "bpe", "sp-bpe"])  # SentencePiece drops a space at the start of a text
@pytest.mark.parametrize("backend", BACKENDS)
def test_streamed_text_is_the_decoded_text(backend: str, kind: str, tokenizers: dict) -> None:
    tokenizer = tokenizers[kind]
    model = make_model(backend, make_config("llama", vocab=tokenizer.n_vocab + 30), scale=2.0)
    prompts = ["the c", "na\u00efve", "\U0001f600"]
    pieces: dict[int, str] = {index: "" for index in range(len(prompts))}

    def on_text(index: int, text: str) -> None:
        assert text
        pieces[index] += text

    results = GENERATE[backend].generate(model, tokenizer, prompts, SampleConfig(max_tokens=30), on_text=on_text)
    for index, (prompt, result) in enumerate(zip(prompts, results, strict=True)):
        assert max(result.tokens) < tokenizer.n_vocab  # rows that the tokenizer does not know are never drawn
        ids = tokenizer.encode(prompt)
        assert tokenizer.decode(ids + result.tokens) == prompt + result.text
        assert pieces[index] == result.text
    drawn = GENERATE[backend].sample_text(model, tokenizer, SampleConfig(prompt=prompts[0], max_tokens=30))
    assert drawn == prompts[0] + results[0].text


@pytest.mark.parametrize("kind", ["char", "bpe", "sp-bpe"])
def test_text_goes_on_where_its_prompt_ends(kind: str, tokenizers: dict) -> None:
    tokenizer = tokenizers[kind]
    text = "the cat na\u00efve \u65e5\u672c \U0001f600 the end."
    ids = tokenizer.encode(text)
    for cut in range(1, len(ids)):
        prompt = tokenizer.decode(ids[:cut])
        if prompt.endswith("\ufffd"):
            continue  # half a character is no prompt
        row = generation.Row(0, ids[:cut], 0, tokenizer, ())
        streamed = [row.add(token, len(ids) - cut, 10**6) for token in ids[cut:]]
        assert "".join(streamed) == row.result().text == text[len(prompt) :]


def test_a_character_that_the_tokenizer_lacks_is_named_with_its_prompt(tokenizers: dict) -> None:
    with pytest.raises(UserError, match=r"prompt 2: character 'Q'"):
        generation.start_rows(make_config("llama"), tokenizers["char"], ["the", "cat Q"], ())


@pytest.mark.parametrize("backend", BACKENDS)
def test_end_of_text_ends_a_row_and_is_not_part_of_it(
    backend: str, tokenizers: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = tokenizers["char"]
    model = make_model(backend, make_config("llama", vocab=tokenizer.n_vocab))
    sample, generate = SampleConfig(max_tokens=20), GENERATE[backend].generate
    free = generate(model, tokenizer, ["the", "mat"], sample)
    eos = free[0].tokens[4]
    monkeypatch.setattr(tokenizer, "eos_id", eos)
    ended = generate(model, tokenizer, ["the", "mat"], sample)
    at = free[0].tokens.index(eos)
    assert ended[0].tokens == free[0].tokens[:at] and ended[0].finish_reason == "eos"
    if eos in free[1].tokens:
        assert ended[1].tokens == free[1].tokens[: free[1].tokens.index(eos)]
    else:
        assert ended[1] == free[1]
    # an empty prompt starts from the end-of-text token
    assert generate(model, tokenizer, [""], sample)[0].prompt_tokens == 1


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
def test_any_of_several_ends_that_a_folder_lists_ends_a_row(
    backend: str, file: str, tokenizers: dict, tmp_path: Path
) -> None:
    """Chat models end a turn and a text with different tokens; a run that starts from one keeps them."""
    sizes = make_config("llama", vocab=tokenizers["bpe"].n_vocab)
    write_model(tmp_path / "a", sizes, make_weights(sizes), tokenizer=tokenizers["bpe"])
    load = {"mlx": mlx_load, "torch": torch_load}[backend].load
    model, tokenizer = load(tmp_path / "a", device="cpu")
    assert tokenizer is not None and not tokenizer.ends
    sample, generate = SampleConfig(max_tokens=20), GENERATE[backend].generate
    free = generate(model, tokenizer, ["the"], sample)[0].tokens
    chosen = [free[9], tokenizer.eos_id, free[5]]
    if file == "config.json":
        (tmp_path / "a" / "generation_config.json").unlink()
    said = json.loads((tmp_path / "a" / file).read_text()) | {"eos_token_id": chosen}
    (tmp_path / "a" / file).write_text(json.dumps(said))
    model, tokenizer = load(tmp_path / "a", device="cpu")
    result = generate(model, tokenizer, ["the"], sample)[0]
    at = min(free.index(token) for token in chosen if token in free)
    assert (result.tokens, result.finish_reason) == (free[:at], "eos")
    write_model(tmp_path / "b", sizes, make_weights(sizes), tokenizer=tokenizer)
    again = load_tokenizer(tmp_path / "b")
    assert again.ends == tokenizer.ends and again.eos_id == tokenizer.eos_id


@pytest.mark.parametrize("said", ["2", [2, "3"], {"a": 1}, True, 2.0])
def test_ends_that_are_no_ids_are_refused(said: object, tokenizers: dict, tmp_path: Path) -> None:
    tokenizers["bpe"].save(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": said}))
    with pytest.raises(UserError, match=r"generation_config.json: eos_token_id .*: expected a token id or a list"):
        load_tokenizer(tmp_path)


class Pieces:
    """A tokenizer whose token i is the text ``words[i]``."""

    eos_id, ends = None, frozenset()

    def __init__(self, words: list[str]):
        self.words, self.n_vocab = words, len(words)

    def decode(self, ids: list[int]) -> str:
        return "".join(self.words[i] for i in ids)


class Stripping(Pieces):
    """As Llama's SentencePiece decodes: without the space at the start of a text."""

    def decode(self, ids: list[int]) -> str:
        return super().decode(ids).removeprefix(" ")


def test_a_space_after_the_prompt_is_kept() -> None:
    tokenizer: Any = Stripping([" once", " upon", " a"])
    row = generation.Row(0, [0], 0, tokenizer, ())
    assert [row.add(1, 2, 9), row.add(2, 2, 9)] == [" upon", " a"]


def feed(words: list[str], stop: tuple[str, ...]) -> tuple[generation.Row, list[str]]:
    """A row that draws the words one after the other, and what it streamed."""
    tokenizer: Any = Pieces(["^", *words])
    row = generation.Row(0, [0], 0, tokenizer, stop)
    streamed = []
    for token in range(1, len(words) + 1):
        if not row.reason:
            streamed.append(row.add(token, len(words), 10**6))
    return row, streamed


@given(
    st.lists(st.text("ab", min_size=1, max_size=3), min_size=1, max_size=12),
    st.lists(st.text("ab", min_size=1, max_size=5), max_size=3),
)
@settings(max_examples=300, deadline=None)
def test_text_ends_before_the_first_stop_string_wherever_the_tokens_break(words: list[str], stop: list[str]) -> None:
    row, streamed = feed(words, tuple(stop))
    text, count, reason = "".join(words), len(words), "length"
    for n in range(1, len(words) + 1):
        so_far = "".join(words[:n])
        starts = [so_far.find(s) for s in stop if s in so_far]
        if starts:
            text, count, reason = so_far[: min(starts)], n, "stop"
            break
    assert (row.result().text, len(row.tokens), row.reason) == (text, count, reason)
    assert "".join(streamed) == text


def test_only_what_may_begin_a_stop_string_is_held_back() -> None:
    assert feed(["ab", "c", "d", "a", "b"], ("cde",))[1] == ["ab", "", "", "cda", "b"]
    assert feed(["x", "c", "d", "e", "z"], ("cde",))[1] == ["x", "", "", ""]


@pytest.mark.parametrize("backend", BACKENDS)
def test_stop_strings_end_a_row(backend: str, tokenizers: dict) -> None:
    tokenizer = tokenizers["bpe"]
    model = make_model(backend, make_config("gpt2", vocab=tokenizer.n_vocab), scale=2.0)
    sample, generate = SampleConfig(max_tokens=30), GENERATE[backend].generate
    free = generate(model, tokenizer, ["the cat"], sample)[0]
    stop = free.text[6:9]
    result = generate(model, tokenizer, ["the cat"], sample, stop=("never to be seen", stop))[0]
    assert result.finish_reason == "stop" and result.text == free.text[: free.text.index(stop)]
    assert result.tokens == free.tokens[: len(result.tokens)] and len(result.tokens) < 30
