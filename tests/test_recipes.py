"""The shipped recipes: each is read, resolved and can be saved; sizes and settings are what names and sources say."""

import dataclasses
import tomllib
from pathlib import Path

import pytest

from mlxgpt.common import recipes
from mlxgpt.common.config import Recipe
from mlxgpt.common.errors import UserError
from mlxgpt.common.model import families, params
from mlxgpt.common.recipes import build, read_toml, to_toml
from mlxgpt.common.train import pretrain, schedule

VOCABULARY = {"shakespeare-char-cpu": 65, "shakespeare-char": 65}
PARAMETERS = {
    "pydocs": 1.07e6,
    "shakespeare-char-cpu": 0.80e6,
    "shakespeare-char": 10.7e6,
    "llama-10m": 10e6,
    "llama-30m": 30e6,
    "gpt2-124m": 124e6,
}


def load(name: str) -> Recipe:
    """A shipped recipe with the vocabulary that its tokenizer will have."""
    recipe = build(read_toml(recipes.find(name)), name)
    size = recipe.model.vocab_size or VOCABULARY.get(name, recipe.data.vocab_size)
    return dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, vocab_size=size))


def test_every_recipe_is_listed_here() -> None:
    assert sorted(PARAMETERS) == recipes.names()


@pytest.mark.parametrize("name", PARAMETERS)
def test_it_resolves_can_be_saved_and_has_the_size_it_says(name: str) -> None:
    recipe = load(name)
    schedule.check_schedule(recipe.optim, recipe.train.steps)
    families.config_to_hf(recipe.model)
    assert params.count(recipe.model) == pytest.approx(PARAMETERS[name], rel=0.05)
    assert build(tomllib.loads(to_toml(recipe))) == recipe
    comment = recipes.find(name).read_text().split("[model]")[0]
    assert len(comment.splitlines()) >= 2 and all(not line or line.startswith("#") for line in comment.splitlines())


def test_nanogpts_settings() -> None:
    cpu, gpu, gpt2 = (load(name) for name in ("shakespeare-char-cpu", "shakespeare-char", "gpt2-124m"))
    for recipe in (cpu, gpu, gpt2):
        biases = (recipe.model.qkv_bias, recipe.model.out_bias, recipe.model.mlp_bias, recipe.model.norm_bias)
        assert not any(biases) and recipe.model.activation == "gelu" and recipe.model.tied
        assert recipe.optim.weight_decay == 0.1 and recipe.optim.clip == 1.0 and recipe.optim.beta1 == 0.9
    sizes = [
        (r.model.n_layer, r.model.n_head, r.model.n_embd, r.model.block_size, r.train.batch_size)
        for r in (cpu, gpu, gpt2)
    ]
    assert sizes == [(4, 4, 128, 64, 12), (6, 6, 384, 256, 64), (12, 12, 768, 1024, 480)]
    rates = [(r.optim.lr, r.optim.min_lr, r.optim.beta2, r.optim.warmup, r.train.steps) for r in (cpu, gpu, gpt2)]
    assert rates == [(1e-3, 1e-4, 0.99, 100, 2000), (1e-3, 1e-4, 0.99, 100, 5000), (6e-4, 6e-5, 0.95, 2000, 600_000)]
    assert [r.train.dropout for r in (cpu, gpu, gpt2)] == [0.0, 0.2, 0.0]
    assert gpt2.train.micro_batch_size == 12


def test_a_corpus_that_was_fetched_is_found_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLXGPT_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    sections = read_toml(recipes.find("shakespeare-char-cpu"))
    with pytest.raises(UserError, match="not fetched yet: mlxgpt data fetch tinyshakespeare"):
        pretrain.recipe_of(sections, None, "x")
    (tmp_path / "corpora").mkdir()
    (tmp_path / "corpora/tinyshakespeare.txt").write_text("text")
    assert pretrain.recipe_of(sections, None, "x").data.source == str(tmp_path / "corpora/tinyshakespeare.txt")
    Path("mine.txt").write_text("text")
    sections["data"]["source"] = "mine.txt"
    assert pretrain.recipe_of(sections, 7, "x").data.source == str(tmp_path / "mine.txt")
    assert pretrain.recipe_of(sections, 7, "x").train.steps == 7
