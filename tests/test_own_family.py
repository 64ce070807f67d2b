"""The folder of family mlxgpt: read as strictly as it is written, and everything that takes a model takes it."""

import json
from pathlib import Path
from typing import Any

import in_process
import ladder
import numpy as np
import own
import pytest
import templates
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import tiny, weights

from convert.conversion import convert
from convert.fuse import fuse
from convert.verify import config as verify_config
from convert.verify import processes, verify
from mlxgpt import cli
from mlxgpt.common.errors import UserError
from mlxgpt.common.folders import model_folder
from mlxgpt.common.model import families, params
from mlxgpt.common.model.family import own_config
from mlxgpt.common.tokenizers.load import train_tokenizer

PAIRS = own.pairwise()
CHOICES: dict[str, Any] = dict(
    position="alibi", activation="relu2", placement="post_add", head_bias=True, embed_norm=True, final_norm=False,
    no_bias=["ln_1"], fused_qkv=False,
)  # fmt: skip
BACKENDS = ("mlx", "torch")


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """What verify starts runs in this process."""
    monkeypatch.setattr(processes, "run_framework", in_process.run_framework)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base: a model with a tokenizer; rows.jsonl: labels of texts; answers.jsonl: completions."""
    made = tmp_path_factory.mktemp("own")
    tokenizer = train_tokenizer("bpe", [templates.TEXT + "<|endoftext|>"], 300)
    config = tiny(family="mlxgpt", block_size=64, vocab_size=tokenizer.n_vocab, **CHOICES)
    model_folder.write_model(made / "base", config, weights(config), tokenizer=tokenizer)
    rows = [{"text": f"the day {n} goes", "label": ["bad", "good"][n % 2]} for n in range(30)]
    (made / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    answers = [{"prompt": row["text"], "completion": row["label"]} for row in rows]
    (made / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in answers))
    return made


@pytest.mark.parametrize("case", PAIRS)
def test_a_folder_says_every_choice_and_holds_the_bits(case: str, tmp_path: Path) -> None:
    config = PAIRS[case]
    model_folder.write_model(tmp_path, config, weights(config))
    assert model_folder.read_config(tmp_path) == config
    found = model_folder.read_params(tmp_path, config)
    assert all(found[name].tobytes() == value.tobytes() for name, value in weights(config).items())
    assert set(model_folder.read_tensors(tmp_path / "model.safetensors")) == set(params.table(config))


REFUSED = [
    ({"n_hed": 4}, "unknown key n_hed (did you mean 'n_head'?): model_type mlxgpt has no such field"),
    ({"n_head": "4"}, "n_head = '4': expected a whole number"),
    ({"n_head": True}, "n_head = True: expected a whole number"),
    ({"tied": 1}, "tied = 1: expected true or false"),
    ({"norm_eps": float("nan")}, "norm_eps = nan: expected a finite number"),
    ({"norm_eps": -1.0}, "model.norm_eps = -1.0: expected a positive number"),
    ({"no_bias": "ln_1"}, "no_bias = 'ln_1': expected a list"),
    ({"no_bias": [1]}, "no_bias = [1]: expected a list of names"),
    ({"window_layers": ["0"]}, "window_layers = ['0']: expected a list of numbers"),
    ({"activation": "tanh"}, "model.activation = 'tanh': expected one of gelu_tanh, gelu, silu, relu, relu2"),
    ({"sinusoid": "halves"}, "model.sinusoid = 'halves': expected 'pairs' where model.position = learned"),
    ({"position_multiplier": 2, "position": "none"},
     "model.position_multiplier = 2.0: expected 1.0 where model.position = none"),
    ({"position": "alibi", "rope_scaling": "linear"},
     "model.rope_scaling = 'linear': expected 'none' where model.position = alibi"),
    ({"position": "sinusoidal", "n_embd": 49, "head_dim": 8},
     "model.n_embd = 49: expected an even number where model.position = sinusoidal"),
    ({"norm_weight": False},
     "model.norm_weight = False: expected true, but for norm = rms, or layer without norm_bias"),
    ({"n_layer": 10**9}, "n_layer = 1000000000: expected at most 10000"),
    ({"vocab_size": 0}, "vocab_size = 0: expected a positive number"),
    ({"mlxgpt": {"format_version": 2}}, "mlxgpt = {'format_version': 2}: expected a table with format_version 1"),
    ({"architectures": ["MlxgptForSequenceClassification"]},
     "architectures ['MlxgptForSequenceClassification']: expected ['MlxgptForCausalLM'], by its labels"),
    ({"no_bias": ["attn.q_proj"]},
     "model.no_bias = 'attn.q_proj': expected modules with a bias: ln_1, attn.c_attn, attn.c_proj, ln_2, mlp.c_fc, "
     "mlp.c_proj, ln_f"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), REFUSED)
def test_what_a_config_cannot_mean_is_refused_in_one_line(change: dict[str, Any], message: str) -> None:
    values = families.config_to_hf(tiny(family="mlxgpt"))
    with pytest.raises(UserError) as caught:
        families.config_from_hf(values | change, "c.json")
    assert str(caught.value) == f"c.json: {message}"


JUNK = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 99), st.floats(), st.text(max_size=3), st.just("alibi"),
    st.lists(st.one_of(st.integers(-1, 3), st.just("ln_1")), max_size=2), st.dictionaries(st.just("a"), st.integers()),
)  # fmt: skip


@given(st.dictionaries(st.sampled_from(sorted(families.config_to_hf(tiny(family="mlxgpt")))), JUNK, max_size=3))
@settings(max_examples=300, deadline=None, database=None)
def test_junk_in_a_config_is_refused_or_read_but_breaks_nothing(change: dict[str, Any]) -> None:
    try:
        config = families.config_from_hf(families.config_to_hf(tiny(family="mlxgpt")) | change)
    except UserError as error:
        assert str(error).startswith("config.json: ") and "\n" not in str(error)
    else:
        assert families.config_from_hf(families.config_to_hf(config)) == config


def test_a_size_that_is_missing_is_named_and_another_field_has_its_default() -> None:
    values = families.config_to_hf(tiny(family="mlxgpt"))
    sparse = {key: values[key] for key in ("model_type", *own_config._SIZES)}
    assert families.config_from_hf(sparse) == tiny(family="mlxgpt")
    for key in own_config._SIZES:
        with pytest.raises(UserError, match=f"^config.json: {key} is missing$"):
            families.config_from_hf({each: value for each, value in sparse.items() if each != key})


def test_the_folder_says_who_loads_it(place: Path) -> None:
    values = json.loads((place / "base/config.json").read_text())
    assert values["mlxgpt"] == {"format_version": 1, "note": own_config.NOTE}
    assert values["model_type"] == "mlxgpt" and "do not know it" in own_config.NOTE


@pytest.mark.parametrize("to", ["hf", "npz"])
def test_it_converts_bit_equal(to: str, place: Path, tmp_path: Path) -> None:
    convert(place / "base", tmp_path / "there", to=to)
    convert(tmp_path / "there", tmp_path / "back", to="hf")
    found, given = (
        model_folder.read_tensors(each / "model.safetensors") for each in (tmp_path / "back", place / "base")
    )
    assert found.keys() == given.keys() and all(found[name].tobytes() == given[name].tobytes() for name in given)
    assert model_folder.read_config(tmp_path / "back") == model_folder.read_config(place / "base")
    report = verify(place / "base", tmp_path / "there", frameworks=["torch"], rungs=["logits"])
    assert report.agrees and any("logits" in each.rung for each in report.checked)


@pytest.mark.parametrize(
    ("to", "message"),
    [
        ("mlx-lm", f"cannot be written as mlx-lm: {own_config.NOTE}: expected --to hf or npz"),
        ("gguf", f"cannot be written as GGUF: {own_config.NOTE}: expected --to hf or npz"),
        ("llama2c", "model.family = 'mlxgpt': llama2.c has only 'llama'"),
        ("nanogpt", "model.family = 'mlxgpt': nanoGPT has only 'gpt2'"),
        ("mingpt", "model.family = 'mlxgpt': minGPT has only 'gpt2'"),
        ("gptmodel", "model.family = 'mlxgpt': GPTModel has only 'gpt2'"),
    ],
)
def test_formats_of_others_refuse_it_with_a_reason(to: str, message: str, place: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        convert(place / "base", tmp_path / "out", to=to)
    assert message in str(caught.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize("judge", ["transformers", "mlx-lm"])
def test_no_library_judges_it(judge: str, place: Path) -> None:
    with pytest.raises(UserError) as caught:
        verify(place / "base", f"{judge}:{place / 'base'}")
    assert str(caught.value) == f"{judge}:{place / 'base'}: {own_config.NOTE}"


def test_what_other_positions_read_is_no_difference_to_verify() -> None:
    for position, differs in (("alibi", False), ("none", False), ("sinusoidal", True)):
        one, other = (tiny(family="mlxgpt", position=position, rope_theta=theta) for theta in (1e4, 500.0))
        assert (verify_config.meaning(one) != verify_config.meaning(other)) == differs


def run(*words: Any) -> None:
    assert cli.main([str(word) for word in words]) == 0


def test_a_bias_that_softmax_does_not_see_may_stay_as_it_is() -> None:
    """What all keys share: the bias of k_proj, or of the norm after it; not where rope or a soft cap comes between."""
    for fields, idle in (
        ({}, {"h.0.attn.k_proj.bias", "h.1.attn.k_proj.bias"}),
        ({"position": "rope"}, set()),
        ({"position": "rope", "no_rope": [1]}, {"h.1.attn.k_proj.bias"}),
        ({"attn_softcap": 2.0}, set()),
        ({"qk_norm": "head"}, {"h.0.attn.k_norm.bias", "h.1.attn.k_norm.bias"}),
    ):
        config = tiny(family="mlxgpt", fused_qkv=False, **fields)
        assert {name for name, param in params.table(config).items() if param.idle} == idle
        made = weights(config, scale=4.0)
        found = ladder.torch_probe(config, made, torch.float64).gradients
        tops = {name: np.abs(value).max() for name, value in found.items() if ".k_" in name and name.endswith("bias")}
        assert {name for name, top in tops.items() if top < 1e-12} == idle


@pytest.mark.parametrize("method", ["lora", "dora", "full"])
def test_it_is_tuned_alike_in_both_frameworks_and_fused(method: str, place: Path, tmp_path: Path) -> None:
    sets = ["train.batch_size=4", "train.compile=off", "optim.lr=0.02", "optim.warmup=0"]
    words = ["-m", place / "base", "-d", place / "answers.jsonl", "--method", method, "--steps", 3, "--device", "cpu"]
    if method == "lora":
        sets += ['adapter.targets=["all-linear", "wte"]', "adapter.bias=all", 'adapter.train=["ln_e"]']
    losses = {}
    for backend in BACKENDS:
        run(
            "finetune",
            *words,
            "-o",
            tmp_path / backend,
            "--backend",
            backend,
            *(x for each in sets for x in ("--set", each)),
        )
        lines = (tmp_path / backend / "metrics.jsonl").read_text().splitlines()
        losses[backend] = [json.loads(line)["loss"] for line in lines if '"loss"' in line]
    assert len(losses["mlx"]) >= 3 and losses["mlx"][-1] < losses["mlx"][0] - 0.01
    assert losses["mlx"] == pytest.approx(losses["torch"], abs=2e-5)
    if method == "full":
        return
    fuse(tmp_path / "mlx", None, tmp_path / "fused")
    assert verify(tmp_path / "fused", tmp_path / "mlx", frameworks=["torch"], rungs=["logits"]).agrees


def test_a_classifier_of_it_answers_alike_in_both_frameworks(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["-m", place / "base", "-d", place / "rows.jsonl", "--task", "classify", "--steps", 2, "--device", "cpu"]
    run(
        "finetune",
        *words,
        "-o",
        tmp_path / "run",
        "--method",
        "full",
        "--backend",
        "torch",
        "--set",
        "train.batch_size=4",
    )
    convert(tmp_path / "run", tmp_path / "folder", to="hf")
    values = json.loads((tmp_path / "folder/config.json").read_text())
    assert values["architectures"] == ["MlxgptForSequenceClassification"] and values["labels"] == ["bad", "good"]
    found = []
    for backend in BACKENDS:
        capsys.readouterr()
        run(
            "classify",
            "-m",
            tmp_path / "folder",
            "-t",
            "the day 4 goes",
            "--json",
            "--device",
            "cpu",
            "--backend",
            backend,
        )
        found.append(list(json.loads(capsys.readouterr().out)["rows"][0]["probabilities"].values()))
    assert np.allclose(*found, atol=1e-6) and np.isclose(sum(found[0]), 1)


def test_generation_and_inspection_are_the_same_in_both_frameworks(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts, inspected = [], []
    for backend in BACKENDS:
        words = ["--backend", backend, "--device", "cpu"]
        capsys.readouterr()
        run("generate", "-m", place / "base", "-p", "the day", "--max-tokens", 12, "--temperature", 0.9, *words)
        texts.append(capsys.readouterr().out)
        run("inspect", place / "base", "-t", "the day goes to it", "--json", *words)
        inspected.append(json.loads(capsys.readouterr().out))
    assert texts[0] == texts[1]
    assert inspected[0]["loss"] == pytest.approx(inspected[1]["loss"], abs=1e-5)
    one, other = (np.concatenate([np.ravel(row) for row in each["attention"]["1"][2]]) for each in inspected)
    assert np.allclose(one, other, atol=1e-6)
