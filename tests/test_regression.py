"""The gate on what is counted (regression.py), and that it sees what it is there for."""

import pytest
import regression

# a mutation of each measurement, and the figures that must be found worse
MUTATIONS = {
    "startup": (
        """
from mlxgpt import cli
main = cli.main
def slow(argv):
    import rich.console
    return main(argv)
cli.main = slow
""",
        {"help.modules"},
    ),
    # a copy of the moments is kept, each tensor is waited for, every block adds zero
    "mlx_step": (
        """
import mlxgpt.engine as engine, mlxgpt.model as model
mx, settle, forward = engine.mx, engine.Engine._settle, model.Block.__call__
def keeping(self, *more):
    settle(self, *more)
    self.kept = {(i, name): array + 0 for i, own in enumerate((self.m, self.v)) for name, array in own.items()}
    for array in self.kept.values():
        mx.eval(array)
engine.Engine._settle = keeping
model.Block.__call__ = lambda self, *args, **kw: forward(self, *args, **kw) + sum(mx.zeros(1) for _ in range(20))
""",
        {"mlx.peak_bytes", "mlx.kept_bytes", "mlx.waits", "mlx.operations"},
    ),
    # tensors are updated apart, chunks of logits are small, and what a block adds is written out
    "metal_step": (
        """
from mlxgpt import fast, stacks
from mlxgpt.common import config
import mlxgpt.model as model
from mlxgpt.model import mx
stacks.helps = lambda device: False
choose, forward, tile = config.TrainConfig.head_chunk, model.Block.__call__, fast.tile
config.TrainConfig.head_chunk = lambda self, *sizes: choose(self, *sizes) // 2
model.Block.__call__ = lambda self, *args, **kw: mx.sort(mx.sort(forward(self, *args, **kw)))
fast.tile = lambda *sizes: tile(*sizes) // 2
""",
        {
            "metal.update.2",
            "metal.update.uncopied.2",
            "metal.update.uncopied.4",
            "metal.gradients.4",
            "metal.chunks",
            "metal.tiles",
        },
    ),
    "torch_step": (
        """
import torch, torch_ref.engine as engine
step = engine.Engine.train_step
def keeping(self, *args):
    stats = step(self, *args)
    self.kept = {name: array.clone() for name, array in self.m.items()}
    self.norms = [float(array.sum().item()) for array in self.kept.values()]
    return stats
engine.Engine.train_step = keeping
""",
        {"torch.kept_tensors", "torch.operations", "torch.waits"},
    ),
    # the sums are made twice, and the tensors hashed twice when read
    "checkpoint": (
        """
from mlxgpt.common.runs import checkpoint
write_state, verify = checkpoint.write_state, checkpoint.verify
def twice(place, state):
    write_state(place, state)
    (place / checkpoint.STATE).unlink()
    write_state(place, state)
checkpoint.write_state = twice
checkpoint.verify = lambda place: (verify(place), verify(place))[0]
""",
        {"checkpoint.flushes", "checkpoint.read_back", "checkpoint.read"},
    ),
    "conversion": (
        """
from convert.formats import stream
read_into = stream.read_into
def twice(file, entry, memory):
    at = file.tell()
    read_into(file, entry, memory)
    file.seek(at)
    read_into(file, entry, memory)
stream.read_into = twice
""",
        {"convert.hf.read"},
    ),
    "report": (
        """
from mlxgpt.common.runs import metrics, plots
read = metrics.read_lines
metrics.read_lines = lambda path: ([*read(path)], [*read(path)], read(path))[2]
plots.BINS = 10_000
plots.curve.__defaults__ = (10_000,)
""",
        {"report.parsed_a_line", "report.calls", "report.page_bytes"},
    ),
}


@pytest.mark.parametrize("name", regression.MEASURES)
def test_nothing_is_worse_than_recorded(name: str) -> None:
    found = regression.measure(name)
    assert found
    assert regression.worse(found) == []


@pytest.mark.parametrize("name", MUTATIONS)
def test_what_makes_it_worse_is_seen(name: str) -> None:
    code, figures = MUTATIONS[name]
    expected = regression.gated(figures)
    seen = {line.partition(":")[0] for line in regression.worse(regression.measure(name, code))}
    assert expected <= seen, f"not seen: {expected - seen}"


def test_a_figure_that_is_not_recorded_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(regression, "EVERYWHERE", {"new", "help.modules"})
    assert [line.partition(":")[0] for line in regression.worse({"new": 1.0, "help.modules": 0})] == ["new"]


def test_every_measurement_has_its_mutation() -> None:
    assert set(MUTATIONS) == set(regression.MEASURES)
    assert all(figures <= set(regression.recorded()) for _, figures in MUTATIONS.values())
