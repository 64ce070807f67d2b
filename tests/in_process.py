"""The programs that ``verify`` starts, called in this process: seconds less for each, the same arrays."""

import importlib
from collections.abc import Sequence
from pathlib import Path

from convert.formats.opened import Opened
from convert.verify import processes as verify_runs
from convert.verify.processes import GREEDY, Plan, Runs
from mlxgpt.common.backend import PACKAGES
from mlxgpt.common.errors import UserError
from mlxgpt.common.inference import probe as probing

PLAIN = verify_runs.run_framework, verify_runs.run_judge


def request(plan: Plan, exact: bool = False) -> probing.Request:
    greedy = GREEDY if plan.greedy and not exact else 0
    ids = probing.read_ids(plan.tokens)
    scales = {"scales": (1.0,)} if plan.adapted else {}
    return probing.Request(ids, plan.prompt, greedy, gradients=plan.gradients, exact=exact, **scales)


def run_framework(name: str, folders: dict[str, Path], plan: Plan, work: Path, runs: Runs) -> None:
    probe = importlib.import_module(f"{PACKAGES[name]}.probe").probe
    try:
        made = {(name, key): dict(probe(place, request(plan), "cpu")) for key, place in folders.items()}
        if name == "torch":
            runs.exact = dict(probe(next(iter(folders.values())), request(plan, True), "cpu"))
        runs.arrays |= made
    except UserError as error:
        runs.failed[name] = str(error)


def run_judge(judge: str, key: str, opened: Opened, plan: Plan, probes: Sequence[str], work: Path, runs: Runs) -> None:
    module = importlib.import_module(verify_runs.JUDGES[judge][1])
    try:
        runs.arrays[judge, key] = dict(module.judge(opened.path, opened.config, request(plan), probes))
    except Exception as error:
        runs.failed[f"{judge} {key}"] = repr(error)
