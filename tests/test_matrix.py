"""Format A -> format B -> format A: every bit comes back, for every pair that can hold a model; see matrix.py."""

from pathlib import Path

import matrix
import numpy as np
import pytest
from models import CASES

from convert.formats.gguf import names as gguf_names

# each format is read and written once; every pair is one reader and one writer
RING = {("hf", "mlx-lm"), ("mlx-lm", "npz"), ("npz", "gguf"), ("gguf", "hf"), ("hf", "mlx-lm, 4 bits"),
        ("mlx-lm, 4 bits", "gguf"), ("npz", "gguf, Q8_0"), ("gguf, Q8_0", "hf")}  # fmt: skip


@pytest.mark.parametrize(
    ("case", "dtype"), [("gpt2", "float32"), ("gpt2-nobias-erf", "float32"), ("llama", "bfloat16")]
)
def test_formats_of_one_family_there_and_back(case: str, dtype: str, tmp_path: Path) -> None:
    own = matrix.OWN[case]
    found = matrix.table(case, dtype, tmp_path, lambda a, b: a in own or b in own)
    assert len(found) == len(matrix.expressible(case)) ** 2 - len(matrix.EVERYWHERE) ** 2
    rounds, widens = ({b for b, form in matrix.FORMATS.items() if getattr(form, name)} for name in ("rounds", "widens"))
    for (a, b), outcome in found.items():
        expected = {"once"} if b in rounds else {"equal", "as float32"} if b in widens else {"equal"}
        assert outcome in expected, (a, b)


@pytest.mark.parametrize("case", CASES)
def test_every_family_through_every_format(case: str, tmp_path: Path) -> None:
    found = matrix.table(case, "bfloat16", tmp_path, lambda a, b: (a, b) in RING)
    assert {pair: "once" if matrix.FORMATS[pair[1]].rounds else "equal" for pair in RING} == found


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("case", CASES)
def test_every_pair_of_every_family(case: str, dtype: str, tmp_path: Path) -> None:
    assert "DIFFERS" not in matrix.table(case, dtype, tmp_path, lambda a, b: True).values()


def test_rows_that_are_not_put_back_would_be_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mutation: q and k of a GGUF file are not put back in order."""
    honest = gguf_names.rearranged

    def forgetful(array: np.ndarray, heads: tuple[int, ...] | None, back: bool = False) -> np.ndarray:
        return array if back else honest(array, heads)

    monkeypatch.setattr(gguf_names, "rearranged", forgetful)
    assert matrix.table("llama", "bfloat16", tmp_path, lambda a, b: (a, b) == ("hf", "gguf")) == {
        ("hf", "gguf"): "DIFFERS"
    }
