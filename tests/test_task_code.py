"""Programs that a model writes: how many pass, and what those that nobody has read cannot do."""

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from mlxgpt.common.config import SampleConfig
from mlxgpt.common.errors import UserError
from mlxgpt.common.tasks import code
from mlxgpt.common.tasks.task import Question, Task
from mlxgpt.common.user_code import limited
from mlxgpt.common.user_code.limited import Ended, Limits

ROOT = Path(__file__).parent.parent
LITTLE = Limits(seconds=1, memory=1 << 28, file_size=1 << 20)
ROW = {
    "task_id": "Own/0",
    "prompt": 'def double(x):\n    """Twice x."""\n',
    "entry_point": "double",
    "canonical_solution": "    return 2 * x\n",
    "test": "def check(candidate):\n    assert candidate(3) == 6\n    assert candidate(0) == 0\n",
}


def program(answer: str) -> str:
    return code.program(code.humaneval([("here", ROW)])[0], answer)


ENDS = {
    "    return 2 * x\n": "",
    "    return x\n": "AssertionError",
    "    return 2 *\n": "SyntaxError",
    "    raise SystemExit(0)\n": "SystemExit: 0",
    "    return 2 * x\nimport sys; sys.exit(0)\n": "SystemExit: 0",  # before its tests
    "    return 2 * x\nimport os; os._exit(0)\n": "ended before its last line",
    "    return 2 * x\nprint('passed'); raise KeyboardInterrupt\n": "KeyboardInterrupt",
    "    return 2 * int(input())\n": "EOFError",
    "    return bytearray(1 << 32)\n": "MemoryError",
    "    open('much', 'wb').write(bytes(1 << 21))\n    return 2 * x\n": "File too large",
    "    import os; os.closerange(0, 64); return 2 * x\n": "ended before its last line",
    "    import socket; socket.create_connection(('127.0.0.1', 9)); return 2 * x\n": "no network",
    "    while True: pass\n": "1 s of a processor were not enough",
}


def test_a_program_passes_that_ran_its_tests_to_the_end() -> None:
    ended = limited.run_all([program(answer) for answer in ENDS], LITTLE)
    for (answer, why), each in zip(ENDS.items(), ended, strict=True):
        assert each.passed == (not why), answer
        assert why in each.why, answer


def test_a_program_has_what_honest_ones_need() -> None:
    answer = """    return 2 * x
from __future__ import annotations
import contextlib, dataclasses, io, os, tempfile, threading
@dataclasses.dataclass
class Point:
    x: int
assert dataclasses.asdict(Point(1)) == {"x": 1}
with tempfile.TemporaryFile("w+") as file, open(os.devnull, "w") as nowhere:
    print("a", file=file), print("b", file=nowhere)
thread = threading.Thread(target=print)
thread.start(), thread.join()
assert os.listdir() == [] and "HOME" in os.environ and "PATH" not in os.environ
for _ in range(20):
    print("x" * 1_000_000)
""".replace("from __future__ import annotations\n", "")
    assert limited.run(program(answer)) == Ended(True, "", limited.check())


def test_a_program_that_waits_is_ended() -> None:
    began = time.perf_counter()
    ended = limited.run("import time; time.sleep(60)", Limits(clock=1))
    assert not ended.passed and ended.why == "1 s by the clock were not enough"
    assert time.perf_counter() - began < 10


HOSTILE = {
    "fork": "import os\nwhile True: os.fork()",
    "daemon": "import os\nif os.fork(): os._exit(0)\nos.setsid()",
    "shell": "import os\nos.system('echo > {outside}/made')",
    "write": "open('{outside}/made', 'w')",
    "link": "import os\nos.symlink('{outside}', 'there')\nopen('there/made', 'w')",
    "remove": "import os\nos.remove('{outside}/there')",
    "rename": "import os\nos.rename('{outside}/there', 'mine')",
    "permissions": "import os\nos.chmod('{outside}/there', 0)",
    "parent": "import os, signal\nos.kill(os.getppid(), signal.SIGTERM)",
}


def test_a_hostile_program_does_nothing_outside(tmp_path: Path) -> None:
    (tmp_path / "there").write_text("kept")
    programs = [each.replace("{outside}", str(tmp_path)) for each in HOSTILE.values()]
    for name, ended in zip(HOSTILE, limited.run_all(programs, LITTLE), strict=True):
        assert not ended.passed and "here" in ended.why, name
    assert [each.name for each in tmp_path.iterdir()] == ["there"]
    assert (tmp_path / "there").read_text() == "kept" and os.access(tmp_path / "there", os.R_OK)


def test_a_program_that_deletes_its_folder_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    limited.run("import os, shutil\nos.makedirs('a/b')\nshutil.rmtree('a')\nos.rmdir(os.getcwd())", LITTLE)
    limited.run("import os\nos.makedirs('a/b')\nos.chmod('a', 0)", LITTLE)
    assert list(tmp_path.iterdir()) == []


# The same below Python's own checks, which code can go around; here there are none.
KERNEL = """
import os, sys
from mlxgpt.common.user_code import kernel
closed = kernel.close({folder!r})
os.chdir({folder!r})
with open("inside", "w"), open(os.devnull, "w"):
    pass
refused = []
import signal, socket, threading
thread = threading.Thread(target=print)
thread.start()
thread.join()
for name, attempt in dict(
    write=lambda: open({outside!r} + "/made", "w"),
    remove=lambda: os.remove({outside!r} + "/there"),
    move=lambda: os.rename("inside", {outside!r} + "/moved"),
    chmod=lambda: os.chmod({outside!r} + "/there", 0),
    times=lambda: os.utime({outside!r} + "/there", (0, 0)),
    fork=os.fork,
    exec=lambda: os.execv("/bin/true", ["true"]),
    spawn=lambda: os.posix_spawn("/bin/true", ["true"], {{}}),
    kill=lambda: os.kill(os.getppid(), 0),
).items():
    try:
        if attempt() == 0 and name == "fork":
            os._exit(0)
    except OSError:
        refused.append(name)
print(*closed, *refused)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="Linux's kernel")
def test_the_kernel_refuses_what_python_would_let_pass(tmp_path: Path) -> None:
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    inside.mkdir()
    outside.mkdir()
    (outside / "there").write_text("kept")
    source = KERNEL.format(folder=str(inside), outside=str(outside))
    ran = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, cwd=ROOT, timeout=60)
    said = set(ran.stdout.split())
    expected = {"write", "remove", "move"} if "files" in said else set()
    expected |= {"chmod", "times", "fork", "exec", "spawn", "kill"} if "processes" in said else set()
    if os.uname().machine in ("x86_64", "aarch64"):
        assert "processes" in said, ran.stderr
    assert said - {"files", "processes"} == expected
    assert (outside / "there").read_text() == "kept" and len(list(outside.iterdir())) == 1


def test_an_interpreter_that_runs_nothing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(UserError, match="runs no program here"):
        limited.run_all(["assert True"])


def test_pass_at_k_is_the_share_of_draws_that_have_one_that_passes() -> None:
    for draws, k in ((1, 1), (5, 1), (5, 3), (6, 6)):
        passed = np.arange(draws + 1)
        expected = [
            np.mean([any(index < right for index in drawn) for drawn in combinations(range(draws), k)])
            for right in passed
        ]
        np.testing.assert_allclose(code.pass_at(passed, draws, k), expected, atol=1e-12)
    large = code.pass_at(np.array([3]), 1000, 100)[0]
    assert math.isclose(large, 1 - math.comb(997, 100) / math.comb(1000, 100))


class Writes:
    """A model that writes a program or another, by seed."""

    context = 100
    cut, chat = 0, False

    def __init__(self) -> None:
        self.seeds: list[int] = []

    def answers(
        self, contexts: Sequence[str], stop: Sequence[str], sample: SampleConfig, say: object = None
    ) -> list[str]:
        self.seeds.append(sample.seed)
        right = len(self.seeds) % 2
        return ["    return 2 * x\n" if right else "    return 3\n" for _ in contexts]


def runs(programs: Sequence[str]) -> list[Ended]:
    return [Ended("2 * x" in each, "" if "2 * x" in each else "AssertionError") for each in programs]


def test_each_draw_has_a_seed_and_each_question_its_programs() -> None:
    questions = code.humaneval([("here", ROW), ("there", ROW)])
    task = Task("own", "code", questions, draws=4, sample=SampleConfig(temperature=0.8, seed=5))
    writes = Writes()
    asked = code.ask(task, questions, ["", ""], writes, runs)  # type: ignore[arg-type]
    assert len(set(writes.seeds)) == 4
    assert asked.each.keys() == {"pass@1"} and asked.each["pass@1"].tolist() == [0.5, 0.5]
    assert asked.answers[0]["ended"] == ["passed", "AssertionError"] * 2
    again = Writes()
    code.ask(task, questions, ["", ""], again, runs)  # type: ignore[arg-type]
    assert again.seeds == writes.seeds


def test_what_cannot_be_scored_is_refused() -> None:
    questions = code.humaneval([("here", ROW)])
    with pytest.raises(UserError, match="--run-code runs them on this machine"):
        code.expect_run(None, "humaneval")
    with pytest.raises(UserError, match="at temperature 0 are the same"):
        code.check_draws(Task("own", "code", questions, draws=2))
    with pytest.raises(UserError, match="'pass@5': expected pass@K"):
        code.check_draws(Task("own", "code", questions, metrics=("pass@5",)))
    for key in ("prompt", "entry_point", "canonical_solution", "test"):
        with pytest.raises(UserError, match=f"file.jsonl, row 1: {key} = None"):
            code.humaneval([("file.jsonl, row 1", {**ROW, key: None})])
    row = {"task_id": 11, "text": "Add.", "code": "def add(a, b):\n    return a + b", "test_list": []}
    with pytest.raises(UserError, match="test_list is empty"):
        code.mbpp([("here", row)])


def test_mbpp_is_asked_as_its_paper_has_it() -> None:
    rows = [
        (f"row {number}", {
            "task_id": number, "text": "Add.", "code": "def add(a, b):\n    return a + b", "test_setup_code": "one = 1",
            "test_list": ["assert add(one, 2) == 3", "assert add(0, 0) == 0", "assert add(4, 4) == 8"],
        })
        for number in range(1, 13)
    ]  # fmt: skip
    task = code.mbpp_task("mbpp", code.mbpp(rows))
    assert [each.where for each in task.questions] == ["row 11", "row 12"] and task.notes
    assert [each.where for each in task.examples] == ["row 2", "row 3", "row 4"] and task.shots == 3
    question = task.questions[0]
    assert question.text.endswith("assert add(4, 4) == 8\n[BEGIN]\n") and question.target.endswith("\n[DONE]")
    right = question.target.removesuffix("[DONE]")
    ended = [limited.run(code.program(question, text)) for text in (right, "def add(a, b): return 3")]
    assert [each.passed for each in ended] == [True, False]


def test_a_published_solution_passes_its_own_tests(tmp_path: Path) -> None:
    rows = [json.loads(line) for line in json.dumps(ROW).splitlines()]
    questions = code.humaneval([("here", row) for row in rows])
    assert limited.run_all([code.program(each, each.target) for each in questions])[0].passed
    assert isinstance(questions[0], Question)
