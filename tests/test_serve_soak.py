"""Clients of all kinds at once: every seeded answer is what generate says, nothing is lost, a fault harms nobody."""

import asyncio
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from decoding import BACKENDS
from serve_site import Site, serving_site
from serving import WAIT, submit

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import serve_soak  # noqa: E402
from benchmarks.serving import clients, pool  # noqa: E402
from mlxgpt.common import backend as backends  # noqa: E402
from mlxgpt.common.config import SampleConfig  # noqa: E402
from mlxgpt.common.errors import RunError  # noqa: E402
from mlxgpt.common.serve import models  # noqa: E402
from mlxgpt.common.serve.engine import Engine  # noqa: E402
from mlxgpt.common.serve.work import Served  # noqa: E402

CLIENTS, ANSWERS, FAULTS = 8, 40, 5


class Breaks:
    """A constraint that fails in the fourth step."""

    over = False

    def __init__(self, served: Served) -> None:
        self.tokens, self.taken = np.ones(served.n_vocab, dtype=bool), 0
        self.tokens[list(served.ends)] = False

    def allowed(self) -> np.ndarray:
        if self.taken == 3:
            raise RunError("planted")
        return self.tokens

    def take(self, token: int) -> None:
        self.taken += 1


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    return serve_soak.write_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module", params=BACKENDS)
def crowded(request: pytest.FixtureRequest, written: tuple[Path, list[str]]) -> Iterator[tuple[Site, list[pool.Case]]]:
    base, adapters = written
    backend, options = backends.load(request.param), models.Options(str(base), adapters=adapters)
    cases = serve_soak.make_cases(request.param, base, adapters, 18)
    engine = Engine(backend, lambda: models.load_all(backend, options), max_batch=4, max_queue=2, cache_bytes=1 << 18)
    engine.start()
    with serving_site(engine) as site:
        yield site, cases
    engine.stop(drain=True)
    assert engine.join(WAIT) and engine.death is None


def test_nothing_is_wrong_or_lost_in_a_crowd(crowded: tuple[Site, list[pool.Case]]) -> None:
    site, cases = crowded
    engine = site.worker
    assert isinstance(engine, Engine)
    kinds = {(case.body["model"], case.path, case.expected is None) for case in cases}
    assert len(kinds) >= 6 and len({case.body["model"] for case in cases}) == 3
    assert not asyncio.run(clients.alone(site.port, cases))

    def break_some() -> list[str]:
        served, errors = engine.served["base"], []
        for number in range(FAULTS):
            sample = SampleConfig(max_tokens=20, seed=number)
            while engine.counts.waiting:
                time.sleep(0.001)
            answer = submit(engine, served, [5, 6, 7], sample, constrain=lambda: Breaks(served))
            errors += answer.wait().errors
        return errors

    def goes_on(tally: clients.Tally) -> bool:
        return tally.answers < ANSWERS or not (tally.left and tally.refused and tally.busy)

    async def both() -> tuple[clients.Tally, list[str]]:
        crowd = clients.crowd(site.port, cases, CLIENTS, 1, goes_on)
        return await asyncio.gather(crowd, asyncio.to_thread(break_some))

    tally, errors = asyncio.run(both())
    assert not tally.wrong, tally.wrong[0]
    assert errors == ["planted"] * FAULTS
    site.until(lambda: not (engine.counts.running or engine.counts.waiting))
    assert not clients.lost(clients.metrics(site.get("/metrics").body.decode()), FAULTS)


def test_a_wrong_answer_is_seen(crowded: tuple[Site, list[pool.Case]]) -> None:
    site, cases = crowded
    case = next(case for case in cases if case.expected and case.expected[0].text)
    assert case.expected
    other = [pool.Choice(case.expected[0].text + "x", case.expected[0].reason), *case.expected[1:]]
    for stream in (False, True):
        tally = clients.Tally()
        asyncio.run(clients.ask(site.port, case, stream, tally))
        assert not tally.wrong
        asyncio.run(clients.ask(site.port, pool.Case(case.path, case.body, other), stream, tally))
        assert len(tally.wrong) == 1


@pytest.mark.slow
def test_twenty_minutes_of_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["serve_soak", "--minutes", "20", "--backend", "mlx", "--no-write"])
    assert serve_soak.main() == 0
