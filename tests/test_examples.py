"""examples/*.py run as they are, and the two of a pair compute the same."""

import importlib
import math
import runpy
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch
from compare import agree
from fake_train import losses

PLACE = Path(__file__).parent.parent / "examples"


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(PLACE)


def run(name: str, main: bool = True) -> dict[str, Any]:
    """The names that a script leaves."""
    return runpy.run_path(str(PLACE / name), run_name="__main__" if main else name)


def test_every_example_is_tested_and_says_how_to_run_it() -> None:
    tests = [Path(__file__), Path(__file__).with_name("test_gpt_page.py")]
    text = "".join(path.read_text() for path in tests)
    for path in PLACE.glob("*.py"):
        assert path.stem in text, path.name
        assert f"python examples/{path.name}" in path.read_text()


def test_a_loop_of_ones_own_learns_alike_in_both(capsys: pytest.CaptureFixture[str]) -> None:
    one, other = (run(f"{name}.py") for name in ("train_mlx", "train_torch"))
    assert one["losses"][0] == pytest.approx(math.log(len(one["letters"])), abs=0.2)
    assert sum(one["losses"][-5:]) / 5 < one["losses"][0] - 0.6
    assert one["losses"][:5] == pytest.approx(other["losses"][:5], abs=1e-4)  # dropout and all
    assert one["losses"] == pytest.approx(other["losses"], abs=1e-3)  # each framework's own AdamW; 4e-5 is found
    assert len(one["answer"].tokens) == 24
    for name in ("train_mlx", "train_torch"):
        code = (PLACE / f"{name}.py").read_text().partition('"""\n\n')[2].splitlines()
        assert len([line for line in code if line]) <= 30


def test_another_mlp_trains_and_agrees(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("swap_mlp_mlx", "swap_mlp_torch"):
        made = run(f"{name}.py")
        assert type(made["model"].h[1].mlp).__name__ == "SquaredReLU"
        out = capsys.readouterr().out
        assert "h.0 to h.1, each" in out
        first, last = (float(line.split()[-1]) for line in out.splitlines()[-2:])
        assert last < first - 1


def test_the_parity_check_passes_and_can_fail(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    parity = importlib.import_module("parity")
    assert parity.main() == 0
    assert capsys.readouterr().out.splitlines()[-1] == "they agree"
    other = parity.swap_mlp_torch.SquaredReLU

    def gelu(self: Any, x: Any, drop: Any = None) -> Any:
        return self.c_proj(parity.torch.nn.functional.gelu(self.c_fc(x, drop)).square(), drop)

    monkeypatch.setattr(other, "forward", gelu)
    assert parity.main() == 1
    assert capsys.readouterr().out.splitlines()[-1] == "they differ"


def test_an_objective_of_ones_own_is_a_run_in_both(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("objective_mlx", "objective_torch"):
        trainer = run(f"{name}.py")["trainer"]
        assert trainer.finished and [line["step"] for line in trainer.metrics("val")] == [20, 40]
        assert "step 40: validation " in capsys.readouterr().out
        run(f"{name}.py")
        assert "nothing to do" in capsys.readouterr().out
    one, other = (losses(f"runs/{name}") for name in ("objective_mlx", "objective_torch"))
    assert one == pytest.approx(other, abs=1e-4)
    assert one[40] < one[1] - 0.8


def test_attention_is_changed_the_same_way() -> None:
    """A subclass in every block: both frameworks agree, and a cache gives what the whole text gives."""
    made: dict[str, np.ndarray] = {}
    for package, call in (("mlxgpt", "__call__"), ("torch_ref", "forward")):
        api, module = (importlib.import_module(f"{package}.{name}") for name in ("api", "model"))

        class Gated(module.Attention):
            """The output times its own sigmoid."""

        real, sigmoid = getattr(module.Attention, call), mx.sigmoid if package == "mlxgpt" else torch.sigmoid

        def gated(self: Any, *given: Any, real: Any = real, sigmoid: Any = sigmoid) -> Any:
            y = real(self, *given)
            return y * sigmoid(y)

        setattr(Gated, call, gated)
        config = {"family": "llama", "n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 16, "vocab_size": 50}
        model = api.new(config, 1, device="cpu").eval()
        plain = api.new(config, 1, device="cpu").eval()
        for block in model.h:
            block.attn.__class__ = Gated
        tokens = [[1, 2, 3, 4, 5]]
        made[package], before = (np.array(each(tokens).tolist()) for each in (model, plain))
        assert np.abs(made[package] - before).max() > 1e-3
        cache = module.make_cache(model, 1, 16)
        parts = [np.array(model([part], cache=cache).tolist()) for part in ([1, 2, 3], [4, 5])]
        agree("cached", np.concatenate(parts, axis=1), made[package], 1e-5)
    agree("changed attention", made["mlxgpt"], made["torch_ref"], 1e-5)
