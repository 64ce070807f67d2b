"""Home-made GPTs adopted from a state dict and 32 tokens: the right choices, exact logits, and the way back."""

from pathlib import Path

import numpy as np
import pytest
from zoo.adopting import adopt, verb
from zoo.animals import make
from zoo.choices import Spec, animals
from zoo.strangers import STRANGERS, Stranger

from convert.adopt import roles, source
from convert.adopt.proof.candidate import distance

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


@pytest.mark.parametrize("n", [10, 73])
def test_of_two_norms_the_one_called_as_the_other_and_more_is_behind(n: int, tmp_path: Path) -> None:
    animal = make(ZOO[n], tmp_path)  # n1, n1b, n2, n2b, in any order in the file
    ours = {rule.theirs: rule.to[0] for rule in roles.propose(source.read(animal.file)).map.rules}
    assert [ours[f"h.{name}.g"] for name in ("n1", "n1b", "n2", "n2b")] == [
        f"h.{{n}}.{name}.weight" for name in ("ln_1", "ln_1_post", "ln_2", "ln_2_post")
    ]


def test_logits_of_another_vocabulary_are_infinitely_far() -> None:
    assert distance(np.zeros((1, 1, 150)), np.ones((1, 1, 61))).worst == float("inf")


def test_of_two_norms_outside_the_blocks_the_final_one_is_behind_them(tmp_path: Path) -> None:
    animal = make(ZOO[100], tmp_path)  # n0 and nf, in any order in the file
    ours = {rule.theirs: rule.to[0] for rule in roles.propose(source.read(animal.file)).map.rules}
    assert (ours["n0.g"], ours["nf.g"]) == ("ln_e.weight", "ln_f.weight")
