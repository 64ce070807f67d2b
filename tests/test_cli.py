"""The command line: the pinned verbs and flags, one line for every error, exit codes, and where recipes are found."""

import argparse
import errno
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mlxgpt import __version__, cli, verbs
from mlxgpt.common import backend, recipes
from mlxgpt.common.errors import RunError, UserError

ROOT = Path(__file__).parent.parent
RUNS_A_MODEL = {"--backend", "--device"}
SAMPLING = {"--max-tokens", "--temperature", "--top-k", "--top-p", "--min-p", "--repetition-penalty", "--seed"}
SAMPLING |= {"--presence-penalty", "--frequency-penalty"}
# Users' scripts depend on these: a flag may be added, and none may go.
FLAGS = {
    "train": {"--out", "--steps", "--stop-after", "--set", "--resume", "--init-from", "--moments", "--force"}
    | {"--data", "--size", "--lr", "--batch-size", "--epochs"}
    | RUNS_A_MODEL,
    "finetune": {
        "--model",
        "--data",
        "--out",
        "--method",
        "--config",
        "--steps",
        "--epochs",
        "--lr",
        "--batch-size",
        "--rank",
        "--adapter",
        "--set",
        "--resume",
        "--stop-after",
        "--task",
        "--train-on-prompt",
        "--force",
    }
    | RUNS_A_MODEL,
    "rl": {"--model", "--prompts", "--reward", "--method", "--out", "--steps", "--lr", "--adapter", "--config"}
    | {"--replay", "--check", "--run-code", "--stop-after", "--set", "--resume", "--force"}
    | RUNS_A_MODEL,
    "plan": {
        "--model",
        "--data",
        "--method",
        "--steps",
        "--set",
        "--chip",
        "--calibrate",
        "--price",
        "--budget",
        "--hours",
        "--memory",
        "--out",
        "--plot",
        "--json",
    }
    | RUNS_A_MODEL,
    "serve": {"--name", "--adapter", "--host", "--port", "--api-key-file", "--allow-origin", "--max-batch", "--kv-bits"}
    | {"--max-queue", "--max-body", "--cache-bytes", "--backend", "--template", "--stop-token", "--lookup", "--draft"},
    "generate": {
        "--model",
        "--adapter",
        "--prompt",
        "--prompt-file",
        "--prompt-ids",
        "--raw",
        "--system",
        "--template-kwargs",
        "--logit-bias",
        "--lookup",
        "--draft",
        "--logprobs",
        "--stop",
        "--kv-bits",
        "--json",
    }
    | SAMPLING
    | RUNS_A_MODEL,
    "chat": {"--model", "--adapter", "--system", "--template", "--lookup", "--draft", "--kv-bits"}
    | SAMPLING
    | RUNS_A_MODEL,
    "fuse": {"--model", "--adapter", "--out", "--dtype", "--dequantize", "--force", "--json"},
    "quantize": {"--bits", "--method", "--data", "--eval-data", "--adapter", "--group-size", "--hessians", "--force"}
    | {"--dtype", "--tokens", "--text-key", "--json"}
    | RUNS_A_MODEL,
    "eval": {"--model", "--adapter", "--data", "--split", "--text-key", "--stride", "--json", "--task", "--limit"}
    | {"--shots", "--log", "--kv-bits", "--against", "--run-code", "--draws", "--max-tokens", "--bos", "--chat"}
    | RUNS_A_MODEL,
    "classify": {"--model", "--adapter", "--text", "--file", "--text-key", "--label-key", "--json"} | RUNS_A_MODEL,
    "score": {"--model", "--adapter", "--text", "--data", "--set", "--json"} | RUNS_A_MODEL,
    "data fetch": {"--from", "--out"},
    "data inspect": {"--text-key", "--tokenizer", "--json", "--model", "--rows", "--set"},
    "data prepare": {"--out", "--text-key", "--tokenizer", "--vocab-size", "--val-fraction", "--workers"},
    "data export": {"--out"},
    "tokenizer train": {"--out", "--text-key", "--kind", "--vocab-size"},
    "tokenizer inspect": {"--text", "--json"},
    "runs": {"--json"},
    "runs check": {"--json"},
    "diagnose": {"--quick", "--json"},
    "report": {"--out", "--export", "--watch", "--port"},
    "convert": {"--to", "--tokenizer", "--dtype", "--bits", "--verify", "--force", "--json"},
    "adopt": {
        "--out",
        "--like",
        "--module",
        "--kwargs",
        "--map",
        "--set",
        "--unproved",
        "--tokenizer",
        "--json",
        "--force",
    },
    "verify": {"--json", "--html", "--weights-only", "--rungs", "--frameworks", "--data"},
    "inspect": {
        "--text",
        "--text-file",
        "--ids",
        "--chat",
        "--adapter",
        "--limit",
        "--top",
        "--layers",
        "--out",
        "--json",
    }
    | RUNS_A_MODEL,
    "probe": {"--tokens", "--out", "--scale", "--greedy"} | RUNS_A_MODEL,
    "doctor": {"--quick", "--backend", "--device", "--out", "--json"},
    "demo": {"--out"},
    "keys": {"--json"},
    "completion": set(),
}


@pytest.fixture
def verb(monkeypatch: pytest.MonkeyPatch):
    """Makes `mlxgpt act [--backend X]` call a function of the test; returns its setter."""
    calls = {}

    def declare(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--backend", choices=["mlx", "torch"])

    def set_function(function) -> None:
        calls["function"] = function

    monkeypatch.setitem(cli.VERBS, "act", verbs.Verb("acts", f"{__name__}:act", declare, ()))
    monkeypatch.setattr(sys.modules[__name__], "act", lambda args: calls["function"](args), raising=False)
    return set_function


def error_of(argv: list[str], capsys: pytest.CaptureFixture, code: int = 2) -> str:
    """The one line that a command ends with, and nothing on stdout."""
    assert cli.main(argv) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    return err


@pytest.mark.parametrize("argv", [["finetune", "-m", "m"], ["eval", "-m", "m"], ["plan", "-m", "m"]])
def test_data_given_twice_is_refused(argv: list[str], capsys: pytest.CaptureFixture) -> None:
    said = error_of([*argv, "--data", "a.jsonl", "--data", "b.jsonl"], capsys)
    assert "a.jsonl and b.jsonl: expected one" in said


@pytest.mark.parametrize("name", sorted(cli.VERBS))
def test_the_pinned_flags_are_there(name: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        cli.main([*name.split(), "--help"])
    shown = capsys.readouterr().out
    assert set(re.findall(r"--[a-z-]+", shown)) >= FLAGS[name]
    assert f"mlxgpt {name}" in shown.partition("examples:")[2]


@pytest.mark.parametrize("name", sorted(cli.VERBS))
def test_the_examples_parse(name: str) -> None:
    for example in cli.VERBS[name].examples:
        parser = cli.Parser()
        cli.VERBS[name].declare(parser)
        parser.parse_args(shlex.split(example)[len(name.split()) :])


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["trian"], ["'trian'", "did you mean 'train'?", "tokenizer"]),
        (["data", "prepar"], ["'data prepar'", "did you mean 'prepare'?"]),
        (["mlx_lm.lora"], ["'mlx_lm.lora'", "did you mean 'finetune'?"]),
        (["sample.py"], ["did you mean 'generate'?"]),
        (["prepare"], ["did you mean 'data prepare'?"]),
        (["tests/"], ["did you mean 'train --data tests/'?"]),
        (["finetune", "README.md"], ["README.md: expected --data README.md"]),
        (["train", "--stpes", "5"], ["--stpes", "did you mean '--steps'?"]),
        (["eval", "--modle", "x"], ["--modle", "did you mean '--model'?"]),
        (["eval", "--tasks", "arc_easy"], ["unknown flag --tasks: --task TASK"]),
        (["eval", "--lora-bos", "x"], ["unknown flag --lora-bos"]),
        (["eval", "--max-iters", "9"], ["unknown flag --max-iters"]),
        (["generate", "--draft-model", "x"], ["--draft-model: --draft DIR"]),
        (["train", "--steps", "0"], ["--steps", "'0'", "positive whole number"]),
        (["train", "a", "b"], ["b"]),
        (["train", "--backend", "jax"], ["'jax'", "mlx", "torch"]),
        (["generate", "--prompt", "x"], ["--model"]),
        (["serve", "tests", "--port", "80"], ["tests: expected --model tests (see mlxgpt serve"]),
        (["tokenizer", "train", "x", "--out", "y", "--kind", "wordpiece"], ["'wordpiece'", "sp-unigram"]),
    ],
    ids=" ".join,
)
def test_wrong_usage_is_one_line(argv: list[str], parts: list[str], capsys: pytest.CaptureFixture) -> None:
    said = error_of(argv, capsys)
    assert said.startswith("mlxgpt: error: ")
    assert [part for part in parts if part not in said] == []


def test_a_model_in_no_flags_place_is_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run/recipe.toml").touch()
    assert "run rows.jsonl: expected --model run (see" in error_of(["finetune", "run", "rows.jsonl"], capsys)


def test_a_value_may_look_like_a_flag(verb, capsys: pytest.CaptureFixture) -> None:
    parser = cli.Parser()
    cli.VERBS["generate"].declare(parser)
    cli._check_flags(parser, ["--prompt=--x", "--stop", "-- two words"])
    with pytest.raises(UserError, match="--x"):
        cli._check_flags(parser, ["--prompt", "--x"])


@pytest.mark.parametrize("argv", [[], ["help"], ["--help"]], ids=str)
def test_the_program_alone_and_help_print_the_verbs_and_a_first_command(
    argv: list[str], capsys: pytest.CaptureFixture
) -> None:
    assert cli.main(argv, backend="torch" if argv else None) == 0
    shown = capsys.readouterr().out
    assert all(re.search(rf"^  {name} ", shown, re.MULTILINE) for name in cli.VERBS)
    prog = "python -m torch_ref" if argv else "mlxgpt"
    assert f"first:\n  {prog} train --data books/ " in shown


def test_help_of_a_verb_by_the_verb_help(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["help", "data", "prepare"])
    assert not ended.value.code and "mlxgpt data prepare" in capsys.readouterr().out


def test_help_of_a_group_lists_its_verbs(capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["data"]) == 0
    shown = capsys.readouterr().out
    assert all(f"data {verb} " in shown for verb in ("fetch", "inspect", "prepare", "export"))
    assert "tokenizer train" not in shown


def raiser(error: BaseException):
    def act(args: argparse.Namespace) -> None:
        raise error

    return act


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UserError("x.toml: empty"), 2, "x.toml: empty"),
        (RunError("three bad\nsteps"), 1, "three bad steps"),
        (OSError(errno.ENOSPC, "No space left on device", "/full/file"), 2, "/full/file: No space left on device"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_exit_codes(error: BaseException, code: int, line: str, verb, capsys: pytest.CaptureFixture) -> None:
    verb(raiser(error))
    assert error_of(["act", "--backend", "torch"], capsys, code) == f"mlxgpt: error: {line}\n"


def test_a_bug_keeps_its_traceback(verb) -> None:
    verb(raiser(ZeroDivisionError()))
    with pytest.raises(ZeroDivisionError):
        cli.main(["act", "--backend", "torch"])


def test_what_a_verb_returns_is_the_exit_code(verb) -> None:
    verb(lambda args: None)
    assert cli.main(["act", "--backend", "torch"]) == 0
    verb(lambda args: 143)
    assert cli.main(["act", "--backend", "torch"]) == 143


def test_terminated(verb) -> None:
    before = signal.getsignal(signal.SIGTERM)
    verb(lambda args: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit) as exit:
        cli.main(["act", "--backend", "torch"])
    assert exit.value.code == 143
    assert signal.getsignal(signal.SIGTERM) is before


def test_the_backend_is_what_was_asked_for_or_the_packages_own(verb) -> None:
    seen = []
    verb(lambda args: seen.append(args.backend))
    cli.main(["act"])
    cli.main(["act"], backend="torch")
    cli.main(["act", "--backend", "mlx"], backend="torch")
    assert seen == ["mlx", "torch", "mlx"]


def test_torch_where_only_torch_is_there(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setitem(sys.modules, "mlx", None)
    assert backend.resolve(None) == "torch"
    with pytest.raises(UserError, match=r"--backend mlx: not installed: pip install mlx"):
        backend.resolve("mlx")
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(backend, "translated", lambda: True)
    assert backend.resolve(None) == "torch"
    assert "an arm64 one" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UserError, match=r"an arm64 one.*pip install 'mlxgpt\[torch\]'"):
        backend.resolve(None)


@pytest.mark.parametrize("package", ["mlxgpt", "torch_ref"])
def test_both_packages_are_commands(package: str) -> None:
    command = [sys.executable, "-m", package]
    version = subprocess.run([*command, "--version"], cwd=ROOT, check=True, capture_output=True, text=True)
    assert version.stdout == f"mlxgpt {__version__}\n"
    wrong = subprocess.run([*command, "trian"], cwd=ROOT, capture_output=True, text=True)
    assert wrong.returncode == 2
    assert wrong.stderr.count("\n") == 1


def test_a_reader_that_leaves_is_no_traceback() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    run = subprocess.run([sys.executable, "-m", "mlxgpt", "--help"], cwd=ROOT, stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert run.returncode == 1
    assert run.stderr == b""


def test_recipes_are_found_by_name_or_path(tmp_path: Path) -> None:
    assert recipes.find("pydocs").is_file()
    mine = tmp_path / "mine.toml"
    mine.write_text("[train]\nsteps = 3\n")
    assert recipes.find(str(mine)) == mine
    with pytest.raises(UserError, match=r"'pydoc' \(did you mean 'pydocs'\?\)"):
        recipes.find("pydoc")
    with pytest.raises(UserError, match=r"none\.toml: no such recipe file"):
        recipes.find(str(tmp_path / "none.toml"))
