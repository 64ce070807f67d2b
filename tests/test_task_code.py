"""Programs that a model writes: how many pass, and what those that nobody has read cannot do."""

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from mlxgpt.common.config import SampleConfig
from mlxgpt.common.errors import UserError
from mlxgpt.common.tasks import code, named, requests
from mlxgpt.common.tasks.published import programs
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


TESTS = f"{ROW['test']}\ncheck(double)"
QUESTION = Question("here", ROW["prompt"], target=ROW["canonical_solution"], program=ROW["prompt"], tests=TESTS)


def program(answer: str) -> str:
    return code.program(QUESTION, answer)


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
        self.seeds, self.contexts = list[int](), list[str]()

    def answers(
        self, contexts: Sequence[str], stop: Sequence[str], sample: SampleConfig, say: object = None
    ) -> list[str]:
        self.seeds.append(sample.seed)
        self.contexts += contexts
        right = len(self.seeds) % 2
        return ["    return 2 * x\n" if right else "    return 3\n" for _ in contexts]


def runs(programs: Sequence[str]) -> list[Ended]:
    return [Ended("2 * x" in each, "" if "2 * x" in each else "AssertionError") for each in programs]


def test_each_draw_has_a_seed_and_each_question_its_programs() -> None:
    questions = [QUESTION, QUESTION]
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
    with pytest.raises(UserError, match="--run-code runs them on this machine"):
        requests.ask(Task("own", "code", [QUESTION]), Writes())  # type: ignore[arg-type]
    with pytest.raises(UserError, match="at temperature 0 are the same"):
        code.check_draws(Task("own", "code", [QUESTION], draws=2))
    with pytest.raises(UserError, match="'pass@5': expected pass@K"):
        code.check_draws(Task("own", "code", [QUESTION], metrics=("pass@5",)))


# ---- the published files


def write(place: Path, rows: Sequence[Mapping[str, object]]) -> str:
    place.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(place)


def test_humaneval_s_own_solutions_pass(tmp_path: Path) -> None:
    task = named.read("humaneval", write(tmp_path / "HumanEval.jsonl", [ROW]))
    assert (task.questions[0].text, task.questions[0].tests) == (ROW["prompt"], TESTS) and task.stop == code.STOP
    assert limited.run_all([code.program(each, each.target) for each in task.questions])[0].passed
    for key in ("prompt", "entry_point", "canonical_solution", "test"):
        with pytest.raises(UserError, match=f"row 1: .*{key}"):
            named.read("humaneval", write(tmp_path / "broken.jsonl", [{**ROW, key: None}]))
    with pytest.raises(UserError, match="expected 0"):
        named.read("humaneval", str(tmp_path / "HumanEval.jsonl"), 2)


def test_mbpp_is_asked_as_its_paper_has_it(tmp_path: Path) -> None:
    tests = ["assert add(one, 2) == 3", "assert add(0, 0) == 0", "assert add(4, 4) == 8"]
    row = {"text": "Add.", "code": "def add(a, b):\n    return a + b", "test_setup_code": "one = 1", "test_list": tests}
    path = write(tmp_path / "mbpp.jsonl", [{**row, "task_id": number} for number in range(1, 13)])
    task = named.read("mbpp", path)
    assert [each.where[-6:] for each in task.questions] == ["row 11", "row 12"] and task.notes
    assert [each.where[-5:] for each in task.examples] == ["row 2", "row 3", "row 4"] and task.shots == programs.SHOTS
    question, writes = task.questions[0], Writes()
    assert question.text.endswith("assert add(4, 4) == 8\n[BEGIN]\n")
    requests.ask(task, writes, run=runs)  # type: ignore[arg-type]
    assert writes.contexts[0] == (question.text + row["code"] + "\n[DONE]\n\n") * 3 + question.text  # type: ignore[operator]
    right = question.target.removesuffix("[DONE]")
    ended = [limited.run(code.program(question, text)) for text in (right, "def add(a, b): return 3")]
    assert [each.passed for each in ended] == [True, False]
    for changed, said in (({"test_list": []}, "test_list"), ({"task_id": "1"}, "task_id is '1'")):
        with pytest.raises(UserError, match=said):
            named.read("mbpp", write(tmp_path / "broken.jsonl", [{**row, "task_id": 11, **changed}]))
