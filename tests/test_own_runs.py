"""The Trainer of the public API: the one loop, folder and resume, with a program's own batches or objective."""

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core
import numpy as np
import pytest
import torch
from fake_train import losses, weights

import mlxgpt.api
import torch_ref.api
from mlxgpt import cli
from mlxgpt.common.batch import Batch
from mlxgpt.common.errors import RunError, UserError
from mlxgpt.common.folders import resolve
from mlxgpt.common.recipes import build, to_toml
from mlxgpt.common.runs import summary
from mlxgpt.common.train import given, own, pretrain

APIS: dict[str, Any] = {"mlx": mlxgpt.api, "torch": torch_ref.api}
BOTH = pytest.mark.parametrize("api", APIS.values(), ids=APIS)
RECIPE: dict[str, dict[str, Any]] = {
    "model": dict(n_layer=1, n_head=2, n_embd=16, block_size=8, vocab_size=11),
    "optim": {"lr": 0.01, "warmup": 2},
    "train": {"steps": 8, "batch_size": 4, "eval_every": 4, "save_every": 3, "dropout": 0.1, "compile": "off"},
    "sample": {"max_tokens": 2},
}


def batches(step: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows in which each token is the one before plus 1 or 2."""
    draw = np.random.default_rng((7, step)).integers(1, 3, (4, 9))
    rows = draw.cumsum(axis=1) % 11
    return rows[:, :-1], rows[:, 1:]


VALIDATION = [batches(10**6), batches(10**6 + 1)]


def objective_of(api: Any) -> Callable[[Any, Any], Any]:
    """Cross-entropy that pays only half for the first half of a row."""

    def objective(model: Any, batch: Any) -> Any:
        found = api.cross_entropy(model(batch.tokens), batch.targets)
        half = np.array([0.5] * 4 + [1.0] * 4, np.float32)
        return found * (mlxgpt.api.mx.array(half) if api is mlxgpt.api else torch_ref.api.torch.tensor(half))

    return objective


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def trainer(api: Any, out: str, **changed: Any) -> Any:
    made: dict[str, Any] = {"source": batches, "validation": VALIDATION, "quiet": True} | changed
    return api.Trainer(made.pop("recipe", RECIPE), out, **made)


def test_a_run_of_ones_own_resumes_bit_for_bit_and_in_the_other_framework() -> None:
    for name, api in APIS.items():
        own = objective_of(api)
        assert trainer(api, f"{name}-whole", objective=own).train() is True
        parts = trainer(api, f"{name}-parts", objective=own)
        assert parts.train(stop_after=5) is False and (parts.step, parts.finished) == (5, False)
        again = trainer(api, f"{name}-parts", objective=own)  # as a cell that runs again, or another process
        assert again.train() is True and (again.step, again.finished) == (8, True)
        assert losses(f"{name}-parts") == losses(f"{name}-whole") and len(losses(f"{name}-parts")) == 8
        assert losses(f"{name}-parts", "val") == losses(f"{name}-whole", "val")
        assert weights(f"{name}-parts", 8) == weights(f"{name}-whole", 8)
    for one, other in (("mlx", "torch"), ("torch", "mlx")):
        out = f"{one}-to-{other}"
        trainer(APIS[one], out, objective=objective_of(APIS[one])).train(stop_after=5)
        trainer(APIS[other], out, objective=objective_of(APIS[other])).train()
        assert losses(out) == pytest.approx(losses(f"{one}-whole"), abs=2e-5)
    assert losses("mlx-whole") == pytest.approx(losses("torch-whole"), abs=1e-4)
    # the objective is what is trained and reported: half of the targets cost half
    trainer(mlxgpt.api, "plain").train()
    assert losses("mlx-whole")[1] == pytest.approx(0.75 * losses("plain")[1], rel=0.02)
    assert losses("mlx-whole", "val")[8] < 0.9 * losses("plain", "val")[8]


@BOTH
def test_the_folder_is_a_run_that_everything_reads(api: Any, capsys: pytest.CaptureFixture[str]) -> None:
    done = trainer(api, "run", quiet=False)
    assert not done.finished and repr(done) == f"Trainer('run', {done.backend}: not begun)"
    done.train()
    assert repr(done).endswith("step 8 of 8)")
    out = capsys.readouterr().out
    assert "32 of 32 tokens are targets" in out and "validation loss" in out and "done in" in out
    assert {path.name for path in Path("run").iterdir()} >= {"recipe.toml", "metrics.jsonl", "environment.json", "last"}
    assert [line["step"] for line in done.metrics("val")] == [4, 8]
    assert [line["split"] for line in done.metrics()].count("train") == 8
    data = json.loads(Path("run/environment.json").read_text())[0]["data"]
    assert data["own"] == {"source": "test_own_runs.batches"} and data["val_batches"] == 2
    model, tokenizer = api.load(Path("run"), device="cpu")
    assert tokenizer is None and model(VALIDATION[0][0]).shape == (4, 8, 11)
    assert cli.main(["runs", "run"]) == 0 and len(summary.read_run(Path("run")).train["loss"]) == 8
    capsys.readouterr()
    assert done.train() is True
    assert "run: nothing to do: all 8 steps are done" in capsys.readouterr().out


def test_the_curve_is_that_of_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    """The recipe's data through the Trainer, its own source through it, and mlxgpt train are one run."""
    np.arange(3000, dtype=np.uint16).__mod__(11).tofile("train.bin")
    np.arange(300, dtype=np.uint16).__mod__(11).tofile("val.bin")
    recipe = {**RECIPE, "data": {"source": "train.bin"}}
    Path("recipe.toml").write_text(to_toml(build(recipe)))
    assert cli.main(["train", "./recipe.toml", "--out", "command", "--device", "cpu"]) == 0
    plain = mlxgpt.api.Trainer("./recipe.toml", "plain", quiet=True, device="cpu")
    plain.train()
    assert losses("plain") == losses("command")
    opened, _ = pretrain.token_source.open_data(plain.recipe.data, 8, plain.recipe.train, None)
    same = trainer(mlxgpt.api, "same", source=opened, validation=None, device="cpu")
    same.train()
    assert losses("same") == losses("command") and losses("same", "val") == losses("command", "val")
    # a run without anything of its own is the command's to resume
    mlxgpt.api.Trainer("./recipe.toml", "mixed", quiet=True, device="cpu").train(stop_after=4)
    assert cli.main(["train", "--resume", "mixed", "--device", "cpu"]) == 0
    assert losses("mixed") == losses("command")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_saves_and_the_next_call_goes_on(number: int, capsys: pytest.CaptureFixture[str]) -> None:
    sent: list[int] = []

    def source(step: int) -> Any:
        if step == 5 and not sent:
            sent.append(step)
            os.kill(os.getpid(), number)
        return batches(step)

    trainer(mlxgpt.api, "whole").train()
    cell = trainer(mlxgpt.api, "run", source=source, quiet=False)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt if number == signal.SIGINT else SystemExit):
        cell.train()
    assert signal.getsignal(signal.SIGINT) is before
    assert "saved at step 5; resume with: Trainer(..., out='run').train()" in capsys.readouterr().out
    assert cell.step == 5 and cell.train() is True
    assert losses("run") == losses("whole") and weights("run", 8) == weights("whole", 8)


def test_a_second_interrupt_breaks_off_the_step_and_not_the_process() -> None:
    sent: list[int] = []

    def source(step: int) -> Any:
        if step == 5 and not sent:
            sent.append(step)
            for _ in range(200):  # until Python has run the handlers, which one of the two may reach
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(0.01)
            raise AssertionError("not interrupted")
        return batches(step)

    trainer(mlxgpt.api, "whole").train()
    cell = trainer(mlxgpt.api, "run", source=source)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        cell.train()
    assert signal.getsignal(signal.SIGINT) is before and cell.step in (3, 4)
    assert cell.train() is True and losses("run") == losses("whole")


def test_only_a_program_that_has_the_source_resumes_its_run(capsys: pytest.CaptureFixture[str]) -> None:
    trainer(mlxgpt.api, "run", objective=objective_of(mlxgpt.api)).train(stop_after=4)
    before = Path("run/metrics.jsonl").read_bytes()
    assert cli.main(["train", "--resume", "run"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "run: began with objective test_own_runs.objective_of" in error
    assert "the program that has them resumes it, with Trainer.train()" in error
    with pytest.raises(UserError, match=r"began with objective .*, source test_own_runs.batches, not with source"):
        trainer(mlxgpt.api, "run").train()

    def others(step: int) -> Any:
        return batches(step + 1)

    own = {"objective": objective_of(mlxgpt.api)}
    with pytest.raises(UserError, match="the data changed: batch of step 1 has sha256"):
        trainer(mlxgpt.api, "run", source=others, **own).train()
    with pytest.raises(UserError, match="the data changed: validation batches has sha256"):
        trainer(mlxgpt.api, "run", validation=VALIDATION[:1], **own).train()
    with pytest.raises(UserError, match=r"optim.lr was 0.01 and is 0.02: a resumed run keeps its recipe"):
        trainer(mlxgpt.api, "run", settings={"optim.lr": 0.02}, **own).train()
    assert Path("run/metrics.jsonl").read_bytes() == before


def test_a_run_starts_from_the_weights_of_another() -> None:
    trainer(mlxgpt.api, "first").train()
    second = trainer(torch_ref.api, "second", init_from="first", settings={"optim.lr": 1e-4, "optim.min_lr": 1e-4})
    second.train(stop_after=2)
    assert second.train() is True
    assert losses("second")[1] < losses("first")[1] - 0.05
    assert json.loads(Path("second/environment.json").read_text())[0]["init_from"] == "first"


def test_batches_of_many_forms_are_one_batch() -> None:
    tokens, targets = batches(1)
    ones = np.ones(tokens.shape)
    forms: list[Any] = [
        (tokens, targets), [tokens.tolist(), targets.tolist()], (tokens, targets, ones), Batch(tokens, targets, ones),
        (mlxgpt.api.mx.array(tokens), torch_ref.api.torch.tensor(targets), ones.astype(bool)),
    ]  # fmt: skip
    made = [given.as_batch(form, "source") for form in forms]
    assert len({given.digest(each) for each in made}) == 1
    assert all(
        (each.tokens.dtype, each.targets.dtype, each.weights.dtype) == ("int32", "int32", "float32") for each in made
    )


def test_validation_of_many_forms_and_none() -> None:
    recipe = build(RECIPE)

    def generator() -> Iterator[Any]:
        yield from VALIDATION

    found = [list(given.Given(batches, form, recipe).validation()) for form in (VALIDATION, generator, generator())]
    assert len({given.digest(*each) for each in found}) == 1 and len(found[0]) == 2
    assert len(list(given.Given(batches, VALIDATION[0], recipe).validation())) == 1
    bare = {**RECIPE, "train": {key: value for key, value in RECIPE["train"].items() if key != "eval_every"}}
    assert trainer(mlxgpt.api, "bare", recipe=bare, validation=None).recipe.train.eval_every == 0
    with pytest.raises(UserError, match="train.eval_every = 4, and no validation batches: expected validation="):
        trainer(mlxgpt.api, "none", validation=None).train()
    assert not Path("none").exists()


T, Y = batches(1)
_count = iter(range(10**6))
WRONG: list[tuple[Any, str]] = [
    (
        lambda step: None,
        "source, step 1: a NoneType: expected a Batch, (tokens, targets) or (tokens, targets, weights)",
    ),
    (lambda step: T, "source, step 1: a ndarray: expected a Batch"),
    (lambda step: (T, Y[:, :4]), "source, step 1: targets have shape (4, 4): expected that of tokens, (4, 8)"),
    (lambda step: (T[0], Y[0]), "source, step 1: tokens have shape (8,): expected (B, T), rows of token ids"),
    (lambda step: (T[:0], Y[:0]), "source, step 1: tokens have shape (0, 8): expected at least one row"),
    (lambda step: (T * 1.0, Y), "source, step 1: tokens are float64: expected integers"),
    (lambda step: (T[:2], Y[:2]), "source, step 1: 2 rows: expected train.batch_size = 4"),
    (lambda step: (T + 20, Y), "source, step 1: tokens[0, 0] = "),
    (lambda step: (T + 2**32, Y), "source, step 1: tokens[0, 0] = "),
    (lambda step: (T, Y - 100), "expected ids; what is not a target has weight 0, and any id"),
    (lambda step: (T, Y + 20), "source, step 1: targets[0, 0] = "),
    (lambda step: (T, Y, np.full(T.shape, np.nan)), "source, step 1: weights: expected finite numbers, none below 0"),
    (lambda step: (np.tile(T, 2), np.tile(Y, 2)), "rows of 16 tokens: expected at most model.block_size = 8"),
    (lambda step: batches(next(_count)), "two calls gave two batches: expected a function of the step alone"),
    (lambda step: (T, Y, 0 * T), "source, step 1: no token is a target: expected weights above 0"),
    (7, "source is a int: expected a function from a step to its batch, or an object with batch()"),
]


@pytest.mark.parametrize(("source", "message"), WRONG)
def test_wrong_batches_are_one_line_before_anything_is_written(source: Any, message: str) -> None:
    with pytest.raises(UserError) as error:
        trainer(mlxgpt.api, "run", source=source).train()
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not Path("run").exists()


@pytest.mark.parametrize(
    ("api", "offset", "weight", "message"),
    [("mlx", 100, 1, "tokens[0, 0] = 10"), ("torch", 0, 0, "no token is a target: expected weights above 0")],
)
def test_a_batch_that_turns_wrong_later_stops_the_run_with_its_checkpoint(
    api: str, offset: int, weight: float, message: str
) -> None:
    def source(step: int) -> Any:
        tokens, targets = batches(step)
        return (tokens + offset, targets, np.full(T.shape, weight)) if step == 5 else (tokens, targets)

    with pytest.raises(RunError) as error:
        trainer(APIS[api], "run", source=source).train()
    text = str(error.value)
    assert text.startswith(f"source, step 5: {message}") and "\n" not in text
    assert "the last good checkpoint is run/checkpoints/step-0000004" in text
    assert resolve.steps_of(Path("run"))[-1] == 4
    assert trainer(mlxgpt.api, "run").train() is True


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"recipe": 7}, "recipe is a int: expected a recipe's name, a .toml file, a dict of sections or a Recipe"),
        ({"recipe": "pydoc"}, "recipe 'pydoc' (did you mean 'pydocs'?)"),
        ({"recipe": {"modle": {}}}, "unknown section [modle] (did you mean 'model'?)"),
        ({"settings": {"train.stpes": 3}}, "unknown key train.stpes (did you mean 'steps'?)"),
        ({"settings": {"steps": 3}}, "settings: 'steps' (did you mean 'train.steps'?): expected section.key"),
        ({"settings": {"train": {"steps": 3}}}, "settings: 'train': expected section.key, such as train.steps"),
        ({"settings": ["train.steps=3"]}, "settings = ['train.steps=3']: expected a dict of section.key"),
        ({"settings": {1: 3}}, "settings = {1: 3}: expected a dict of section.key"),
        ({"validation": 5}, "validation is a int: expected a list of batches, or a function that returns one"),
        ({"tokenizer": len}, "tokenizer is a builtin_function_or_method: expected what load returns"),
        ({"out": None}, "out is a NoneType: expected the run folder, as str or Path"),
        ({"settings": {"train.steps": "3"}}, "train.steps = '3': expected int"),
        ({"settings": {"model.family": "llama", "model.position": "learned"}}, "model.position"),
        ({"settings": {"model.vocab_size": 0}}, "model.vocab_size = 0: expected the number of tokens"),
        ({"objective": 7}, "objective is a int: expected a function of model and batch"),
        ({"source": None}, "validation: only with source: the recipe's data have their own"),
        ({"tokenizer": "nowhere"}, "nowhere"),
        ({"init_from": "adapter"}, "init_from adapter: an adapter: expected a model; mlxgpt fuse --model adapter"),
        ({"init_from": "./nowhere"}, "./nowhere: no such folder"),
        ({"device": "tpu"}, "device tpu"),
        ({"out": "file"}, "file: exists; expected a folder that does not"),
    ],
)
def test_wrong_arguments_are_one_line_in_the_words_of_python(arguments: dict[str, Any], message: str) -> None:
    Path("file").write_text("")
    Path("adapter").mkdir()
    Path("adapter/adapter_config.json").write_text("{}")
    arguments = dict(arguments)
    with pytest.raises(UserError) as error:
        trainer(mlxgpt.api, arguments.pop("out", "run"), **arguments).train()
    text = str(error.value)
    assert message in text and "\n" not in text and "--" not in text.partition("mlxgpt ")[0]
    assert {path.name for path in Path().iterdir()} == {"file", "adapter"}


def test_flags_in_an_error_become_arguments() -> None:
    with pytest.raises(UserError) as error, own._in_python():
        raise UserError(
            "memory: would fit: --set train.micro_batch_size=1 --set a.b=true; --force starts it anyway; "
            "mlxgpt plan --model M measures it"
        )
    assert str(error.value) == (
        "memory: would fit: settings={'train.micro_batch_size': 1} settings={'a.b': True}; force starts it anyway; "
        "mlxgpt plan --model M measures it"
    )


def test_an_objective_that_reads_values_while_mlx_compiles_is_told_how() -> None:
    def objective(model: Any, batch: Any) -> Any:
        found = mlxgpt.api.cross_entropy(model(batch.tokens), batch.targets)
        return found / float(found.max())

    settings = {"train.compile": "on"}
    with pytest.raises(
        RunError, match="the objective, on the first batch: .* settings={'train.compile': 'off'}"
    ) as error:
        trainer(mlxgpt.api, "run", objective=objective, settings=settings).train()
    assert "\n" not in str(error.value) and not Path("run").exists()


@pytest.mark.parametrize("step", [-1, "2", 1.5])
def test_a_step_to_stop_after_is_one(step: Any) -> None:
    with pytest.raises(UserError, match="expected a step, or 0 for the end"):
        trainer(mlxgpt.api, "run").train(step)
    assert not Path("run").exists()


def test_an_objective_without_a_gradient_is_one_line_in_both() -> None:
    for name, api in APIS.items():
        ones = np.ones(T.shape, np.float32)
        made = mlx.core.array(ones) if name == "mlx" else torch.tensor(ones)
        with pytest.raises(RunError, match="zero") as error:
            trainer(api, name, objective=lambda model, batch, made=made: made).train()
        assert "\n" not in str(error.value)


def test_an_objective_that_reduces_is_refused_before_anything_is_written() -> None:
    for api in APIS.values():
        with pytest.raises(UserError, match="objective returned"):
            trainer(api, "run", objective=lambda model, batch: model(batch.tokens).mean()).train()
        assert not Path("run").exists()
