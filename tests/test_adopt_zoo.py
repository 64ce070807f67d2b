"""Home-made GPTs adopted from a state dict and 32 tokens: the right choices, exact logits, and the way back."""

from pathlib import Path

import pytest
from zoo.adopting import adopt, verb
from zoo.animals import make
from zoo.choices import Spec, animals
from zoo.strangers import STRANGERS, Stranger

ZOO = animals()
QUICK = (20, 34, 40, 71)
"""Animals of the default suite: every framework, stacked and not, found fast."""


@pytest.mark.parametrize("spec", [ZOO[n] if n in QUICK else pytest.param(ZOO[n], marks=pytest.mark.slow)
                                  for n in range(len(ZOO))], ids=lambda spec: spec.name)  # fmt: skip
def test_an_animal_is_adopted(spec: Spec, tmp_path: Path) -> None:
    made = adopt(make(spec, tmp_path / "zoo"), tmp_path / "model")
    assert not made.faults, (spec, made.faults)


@pytest.mark.parametrize("name", STRANGERS)
def test_a_stranger_is_refused_with_what_was_found(name: str, tmp_path: Path) -> None:
    stranger: Stranger = STRANGERS[name]
    (tmp_path / "in").mkdir()
    path = stranger.make(tmp_path / "in")
    like = ["--like", tmp_path / "in" / "sample.npz"] if stranger.sample else []
    flags = [*like, *(flag for each in stranger.known for flag in ("--set", each)), "--backend", "torch", "--unproved"]
    code, _, err = verb("adopt", path, *flags, "--out", tmp_path / "model")
    lines = [line for line in err.splitlines() if line.startswith("mlxgpt: error")]
    assert code == stranger.code, err[-500:]
    assert len(lines) == 1 and all(word in lines[0] for word in stranger.said), lines
    assert "Traceback" not in err and not (tmp_path / "model").exists()
    assert sorted(each.name for each in tmp_path.iterdir()) == ["in"], "something was left behind"
