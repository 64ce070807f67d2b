"""Values for the template beside messages: of the recipe, of a row, and of --template-kwargs."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
import templates
from models import tiny
from talks import (
    IM,
    THINKS,
    opened,
    refused,
    said,
    template,
    trained,
    turns,
    write,
)
from templates import tokenizer_folder
from transformers import AutoTokenizer

from mlxgpt import cli
from mlxgpt.common import recipes
from mlxgpt.common.config import Recipe, TuneConfig
from mlxgpt.common.errors import UserError
from mlxgpt.common.folders import model_folder
from mlxgpt.common.model import params
from mlxgpt.common.sft.encode import Encoder
from mlxgpt.common.sft.template import Template
from mlxgpt.common.tokenizers.load import load_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tokenizer_folder(tmp_path_factory.mktemp("tokenizer"), templates.SMOLLM2, IM)


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    return load_tokenizer(folder)


def test_values_for_the_template_come_from_the_recipe_and_the_row(tokenizer: Any, theirs: Any, tmp_path: Path) -> None:
    rows = opened(
        write(tmp_path / "rows.jsonl", {"messages": said("q", "a")},
              {"messages": said("q", "a"), "chat_template_kwargs": {"thinks": True}})
    )  # fmt: skip
    found = template(tokenizer, THINKS, thinks=False)
    examples, _ = Encoder(TuneConfig(), tokenizer, found, 1024).examples(rows)
    for example, thinks in zip(examples, (False, True), strict=True):
        ids = theirs.apply_chat_template(said("q", "a"), chat_template=THINKS, thinks=thinks, return_dict=False)
        assert [*example.tokens, example.targets[-1]] == ids
    with pytest.raises(
        UserError, match="row 2: chat_template_kwargs: thinks: the template does not read it: it reads no"
    ):
        trained(template(tokenizer, turns("{{ m.content }}")), *rows)
    path = write(tmp_path / "rows.jsonl", {"messages": said("q", "a"), "chat_template_kwargs": "[1]"})
    assert "chat_template_kwargs is list '[1]': expected an object" in refused(path)


@pytest.mark.parametrize(
    ("kwargs", "expected"),
    [
        (
            {"thinsk": 1},
            "chat_template_kwargs: thinsk (did you mean 'thinks'?): the template does not read it: it reads",
        ),
        (
            {"messages": []},
            "chat_template_kwargs: messages: they are the row's: expected values that the template reads",
        ),
        ({"add_generation_prompt": True}, "add_generation_prompt: it follows from what is rendered"),
        ({"tools": []}, "tools: they are the row's key tools"),
    ],
)
def test_values_that_no_template_reads_are_refused(kwargs: dict[str, Any], expected: str, tokenizer: Any) -> None:
    with pytest.raises(UserError) as caught:
        template(tokenizer, THINKS, **kwargs)
    assert expected in str(caught.value)


@pytest.mark.parametrize(
    "given",
    [
        'tune.chat_template_kwargs={"enable_thinking": false, "depth": {"n": [1, 2]}}',
        "tune.chat_template_kwargs={enable_thinking = false, depth = {n = [1, 2]}}",
    ],
)
def test_values_for_the_template_are_settings(given: str) -> None:
    expected = {"enable_thinking": False, "depth": {"n": [1, 2]}}
    sections = recipes.apply_sets({"tune": {}, "adapter": {}}, [given])
    recipe = recipes.build(sections)
    assert recipe.tune and recipe.tune.chat_template_kwargs == expected
    assert recipes.build(recipes.tomllib.loads(recipes.to_toml(recipe))) == recipe
    more = recipes.build(recipes.apply_sets(sections, ["tune.chat_template_kwargs.depth=3"]))
    assert more.tune and more.tune.chat_template_kwargs == expected | {"depth": 3}
    assert Recipe(tune=TuneConfig()).tune == TuneConfig()


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("tune.chat_template_kwargs=[1]", "expected dict"),
        ("tune.chat_template_kwargs={", "not JSON"),
        ('tune.chat_template_kwargs={"a": null}', "expected text, numbers, true, false, lists, tables"),
        ("tune.chat_template_kwarg.a=1", "did you mean 'chat_template_kwargs'?"),
        ("tune.date.a=1", "unknown key tune.date.a"),
        ("tune.drop_nulls=maybe", "expected one of auto, true, false"),
    ],
)
def test_wrong_settings_are_named(given: str, expected: str) -> None:
    with pytest.raises(UserError) as caught:
        recipes.build(recipes.apply_sets({"tune": {}}, [given]))
    assert expected in str(caught.value)


def test_true_and_false_may_be_tomls() -> None:
    for value in ("true", True):
        recipe = recipes.build({"tune": {"drop_nulls": value}})
        assert recipe.tune and recipe.tune.drop_nulls == "true"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> Path:
    """A model whose template reads ``thinks``."""
    place = tmp_path_factory.mktemp("model") / "model"
    tokenizer = load_tokenizer(tokenizer_folder(place.parent / "tokenizer", THINKS, IM))
    config = tiny(family="llama", block_size=64, vocab_size=tokenizer.n_vocab)
    model_folder.write_model(place, config, params.init_params(config, 1), tokenizer=tokenizer)
    return place


def test_a_run_keeps_the_values_and_inspect_shows_them(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    talks = [said(f"q{n}", "a1", "q2", "a2") for n in range(5)]
    for talk in talks:
        talk[1]["weight"] = 0
    write(tmp_path / "rows.jsonl", *({"messages": talk} for talk in talks))
    kwargs = ["--set", "tune.chat_template_kwargs.thinks=false"]
    assert cli.main(["data", "inspect", "rows.jsonl", "-m", str(model), "--json", *kwargs]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["chat_template_kwargs"] == {"thinks": False}
    pieces = found["rows"][0]["pieces"]
    assert [(piece["trained"], piece["text"]) for piece in pieces][1:] == [(True, "quick a2<|im_end|>"), (False, "\n")]
    assert "quick a1<|im_end|>" in pieces[0]["text"]
    run = ["finetune", "--backend", "torch", "--device", "cpu", "--set", "train.sample_every=0"]
    small = ["--set", "sample.max_tokens=0", "--steps", "2", "--stop-after", "1"]
    assert cli.main([*run, "--model", str(model), "--data", "rows.jsonl", "--out", "run", *kwargs, *small]) == 0
    assert 'chat_template_kwargs = {"thinks" = false}' in (tmp_path / "run/recipe.toml").read_text()
    out = capsys.readouterr().out
    assert "an answer ends with <|im_end|>, thinks = False" in out
    assert cli.main(["finetune", "--resume", "run", "--backend", "torch", "--device", "cpu"]) == 0
    assert "--template-kwargs '{\"thinks\": false}'" in capsys.readouterr().out
    assert cli.main(["finetune", "--resume", "run", "--set", "tune.chat_template_kwargs.thinks=true"]) == 2
    assert "chat_template_kwargs" in capsys.readouterr().err


@pytest.mark.parametrize("words", [("chat",), ("generate", "-p", "q")])
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ('{"think": 1}', "chat_template_kwargs: think (did you mean 'thinks'?)"),
        ("thinks=1", "--template-kwargs = thinks=1: not JSON"),
        ("[1]", "--template-kwargs = [1]: expected a JSON object, such as"),
    ],
)
def test_values_that_mean_nothing_are_named_by_every_verb(
    words: tuple[str, ...],
    given: str,
    message: str,
    model: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    verb, *rest = words
    assert (
        cli.main([verb, "-m", str(model), "--backend", "torch", "--device", "cpu", "--template-kwargs", given, *rest])
        == 2
    )
    assert message in capsys.readouterr().err


KWARGS = ["--template-kwargs", '{"thinks": false}']


def test_generate_chat_and_eval_give_the_template_its_values(
    model: Path, theirs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "rows.jsonl", {"messages": said("q", "a")})
    seen: list[str] = []
    render = Template._rendered

    def watched(this: Any, *args: Any) -> str:
        seen.append(render(this, *args))
        return seen[-1]

    monkeypatch.setattr(Template, "_rendered", watched)
    monkeypatch.setattr("sys.stdin", io.StringIO("q\n"))
    for verb, *rest in (["generate", "-p", "q", "-n", "1"], ["chat", "-n", "1"], ["eval", "-d", "rows.jsonl"]):
        seen.clear()
        words = [verb, "-m", str(model), "--backend", "torch", "--device", "cpu", *rest]
        flag = ["--set", "tune.chat_template_kwargs.thinks=false"] if verb == "eval" else KWARGS
        assert cli.main([*words, *flag]) == 0
        asked = {"chat_template": THINKS, "thinks": False, "tokenize": False}
        talk, generation = (said("q", "a"), False) if verb == "eval" else (said("q"), True)
        assert theirs.apply_chat_template(talk, add_generation_prompt=generation, **asked) in seen
    words = ["generate", "-m", str(model), "-p", "q", "--raw", "--backend", "torch", *KWARGS]
    assert cli.main(words) == 2
    assert "--template-kwargs: is for a chat template, and --raw leaves it out" in capsys.readouterr().err
