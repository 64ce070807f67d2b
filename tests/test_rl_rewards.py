"""Rewards and settings of mlxgpt rl: what is built in, a reward model, and what is refused before a run is made."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rl_runs
from rl_runs import ASKED, BACKENDS, go, opened

from mlxgpt import cli
from mlxgpt.common import backend
from mlxgpt.common.align.rl import rollouts, scorer, user_rewards
from mlxgpt.common.folders import model_folder, resolve
from mlxgpt.common.model import params
from mlxgpt.common.tokenizers import load as tokenizer


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, prompts and rewards."""
    return rl_runs.make(tmp_path_factory.mktemp("rl"))


@pytest.fixture
def at(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder."""
    monkeypatch.chdir(place)
    return place


@pytest.mark.parametrize(
    ("reward", "said"),
    [
        ("raises", "line 12: ZeroDivisionError: division by zero"),
        ("nan", "nan for completion 1"),
        ("short", "7 rewards of 8 completions: expected one each"),
        ("words", "completion 1: 'good': expected a number"),
        ("moody", "for the same completion: expected a function of prompt"),
        ("hangs", "1 s were not enough"),
        ("dies", "exit code 3"),
        ("none", "expected FILE.py:FUNCTION to name one of them"),
    ],
)
def test_rewards_that_cannot_be_used_end_it_before_anything_is_written(
    at: Path, reward: str, said: str, capsys: Any
) -> None:
    assert go("no", "--backend", "torch", "--set", "rl.seconds=1", reward=f"rewards.py:{reward}") == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1 and "--reward " in err and reward in err
    assert not Path("no").exists()


def test_a_reward_that_fails_later_loses_nothing(at: Path, capsys: Any) -> None:
    assert go("failed", "--backend", "torch", "--set", "train.save_every=1", reward="rewards.py:later") == 1
    err = capsys.readouterr().err
    assert "step 3: --reward" in err and "1 rewards of 8" in err and "last good checkpoint is" in err
    assert resolve.steps_of(Path("failed"))[-1] == 2
    fixed = (at / "rewards.py").read_text().replace("calls > 2", "calls > 99").replace("calls < 3", "calls < 99")
    (at / "fixed").mkdir()
    (at / "fixed" / "rewards.py").write_text(fixed)
    words = ["rl", "--resume", "failed", "--backend", "torch", "--device", "cpu", "--reward"]
    assert cli.main([*words, "fixed/rewards.py:later"]) == 2  # other rewards within one curve
    assert "the data changed: reward 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--set", "sample.top_k=5"), "sample.top_k: not with mlxgpt rl"),
        (("--set", "train.dropout=0.1"), "train.dropout = 0.1"),
        (("--set", "train.batch_size=3"), "expected rl.prompts x rl.completions = 8"),
        (("--set", "tune.epochs=1"), "tune.epochs: of mlxgpt finetune"),
        (("--set", "rl.max_tokens=39"), "leaves no room"),
        (("--reward", "nothing.py"), "nothing.py: no such file"),
        (("--reward", "best"), "--reward best: no such file or folder"),
        (("--reward", "tests"), "--run-code runs them on this machine"),
        (("--reward", "regex:("), "pattern '('"),
        (("--reward", "length:x"), "expected length:N"),
        (("--reward", "base"), "a language model: expected a reward model"),
        (("--set", "rl.mask_truncated=true"), "no completion of the first rollout ended"),
    ],
)
def test_bad_settings_are_one_line(at: Path, words: tuple[str, ...], said: str, capsys: Any) -> None:
    capsys.readouterr()
    assert go("no", "--backend", "torch", *words, reward="" if "--reward" in words else "exact") == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1 and not Path("no").exists()


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([], "no rows: expected prompts"),
        ([{"text": "x"}], "keys 'text': expected prompt"),
        ([{"prompt": [{"role": "user", "content": "x"}]}], "has no chat template"),
        ([{"prompt": "say"}], "no key 'answer': --reward exact reads it"),
    ],
)
def test_bad_prompts_are_one_line(at: Path, rows: list[Any], said: str, capsys: Any) -> None:
    Path("bad.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert go("no", "--backend", "torch", reward="exact", prompts="bad.jsonl") == 2
    assert said in capsys.readouterr().err and not Path("no").exists()


def test_rewards_that_are_built_in(at: Path) -> None:
    source = opened("--reward", "regex:^a+$", "--reward", "length:4", "--reward", "tests", "--run-code",
                    "--set", "rl.weights=[1, 0.5, 2, 1]").source  # fmt: skip
    prompts = [source.prompts.rows[0], source.prompts.rows[0]]
    columns = {"answer": " red", "tests": "assert aaaa == 1", "program": ""}
    prompts = [each.__class__(each.where, each.text, None, columns, each.ids) for each in prompts]
    found = source.rewards(prompts, ["red ", "aaaa"])
    assert found["exact"].tolist() == [1, 0] and found["regex:^a+$"].tolist() == [0, 1]
    assert found["length:4"].tolist() == [1, 1] and found["tests"].tolist() == [0, 0]
    passing = source.rewards(prompts, ["aaaa = 1", "aaaa = 2"])
    assert passing["tests"].tolist() == [1, 0]
    assert source.rewards.total(found).tolist() == [3, 2.5]
    source.rewards.close()


@pytest.mark.parametrize("name", BACKENDS)
def test_a_reward_model_rewards_as_score_does(at: Path, name: str, capsys: Any) -> None:
    spelled = tokenizer.load_tokenizer("base")
    model = dataclasses.replace(model_folder.read_config(Path("base")), labels=("LABEL_0",), tied=False)
    weights = params.init_params(model, 4)
    if not Path("judge").exists():
        model_folder.write_model(Path("judge"), model, weights, tokenizer=spelled)
    out = f"judged-{name}"
    assert go(out, "--backend", name, reward="judge", steps=2) == 0
    (rows,) = rollouts.read(Path(out) / rollouts.FILE)
    prompts = [json.loads(line)["prompt"] for line in Path("prompts.jsonl").read_text().splitlines()]
    asked = [{"prompt": prompts[row.prompt], "completion": row.text} for row in rows]
    Path("scored.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    capsys.readouterr()
    assert cli.main(["score", "-m", "judge", "-d", "scored.jsonl", "--json", "--backend", name]) == 0
    expected = [row["score"] for row in json.loads(capsys.readouterr().out)["rows"]]
    assert [row.rewards["judge"] for row in rows] == pytest.approx(expected, abs=1e-6)
    assert np.std(expected) > 0
    library = backend.load(name)
    score = scorer.open_scorer(library, "judge", "cpu")
    assert np.isfinite(score([opened().source.prompts.rows[0]], [""])).all()  # ended at once


def test_a_worker_that_hangs_is_gone_and_another_answers(at: Path) -> None:
    process = user_rewards.Process()
    path = str(at / "rewards.py")
    asked = {"path": path, "function": "hangs", "prompts": ["a"], "completions": ["b"], "columns": {}}
    with pytest.raises(Exception, match="were not enough"):
        process.ask(asked, 0.5, "here")
    assert process.ask({**asked, "function": "same"}, 20, "here") == {"rewards": [1.0]}
    process.close()


@pytest.mark.parametrize(("count", "said"), [(2, "2 of 7 prompts have more than 32 tokens"), (0, "")])
def test_prompts_without_room_are_counted_and_left_out(at: Path, count: int, said: str, capsys: Any) -> None:
    rows = [{"prompt": "say " * 40 + word, "answer": word} for word in ASKED[:count]]
    Path("long.jsonl").write_text(Path("prompts.jsonl").read_text() + "".join(json.dumps(row) + "\n" for row in rows))
    source = opened("--prompts", "long.jsonl")
    assert len(source.source.prompts.rows) == 5 and source.source.prompts.dropped == count
    assert said in capsys.readouterr().out
