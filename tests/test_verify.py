"""mlxgpt verify agrees with what agrees, names what was broken on purpose, and says what it did not check."""

import io
import json
import shutil
from pathlib import Path

import in_process
import models
import mutations
import numpy as np
import pytest
from mutations import BASES, MUTATIONS

import convert.verify
from convert import convert as convert_model
from convert.formats.opened import Moments, Tensor
from convert.verify import html as verify_html
from convert.verify import processes as verify_runs
from convert.verify import tensors as verify_tensors
from convert.verify import text as verify_text
from convert.verify import verify
from convert.verify.report import Figure, Report, Row
from mlxgpt import cli
from mlxgpt.common.folders import model_folder

KEYS = {"agrees", "a", "b", "findings", "checked", "not_checked", "notes", "figures", "tensors"}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """Of every base the source and what it converted to."""
    words = mutations.tokenizer()
    return {base: mutations.pair(base, tmp_path_factory.mktemp(base), words) for base in BASES}


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """No process of its own for every framework and library."""
    monkeypatch.setattr(verify_runs, "run_framework", in_process.run_framework)
    monkeypatch.setattr(verify_runs, "run_judge", in_process.run_judge)


def run(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, dict]:
    capsys.readouterr()
    code = cli.main(["verify", *map(str, args), "--json"])
    return code, json.loads(capsys.readouterr().out)


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("base", BASES)
def test_what_was_converted_agrees(base: str, pairs: dict, capsys: pytest.CaptureFixture[str]) -> None:
    both = base in ("llama", "gpt2")
    code, report = run(capsys, *pairs[base], *(() if both else ("--frameworks", "mlx")))
    assert code == 0 and report["agrees"] is True and report["findings"] == []
    assert report.keys() == KEYS
    assert not [item for item in report["not_checked"] if item["requested"]]
    names = {item["rung"] for item in report["checked"]}
    assert names == set(convert.verify.RUNGS) - (set() if base not in ("gpt2", "llama2c") else {"tokenizer"})
    # MLX, torch, and one against the other
    assert len({figure["pair"] for figure in report["figures"]}) == (3 if both else 1)


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("name", MUTATIONS)
def test_what_is_broken_is_named(name: str, pairs: dict, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mutation = MUTATIONS[name]
    source, place = pairs[mutation.base][0], shutil.copytree(pairs[mutation.base][1], tmp_path / "broken")
    mutation.change(place)
    code, report = run(capsys, source, place, "--frameworks", "mlx")
    assert code == 1 and report["agrees"] is False
    found = {
        rung: [each["name"] for each in report["findings"] if each["rung"] == rung] for rung in convert.verify.RUNGS
    }
    assert any(mutation.name in each for each in found[mutation.rung]), report["findings"]
    if mutation.place:
        assert set(found["activations"]) == ({mutation.place} if mutation.place != "logits" else set())
        assert found["gradients"] and found["logits"]
        code, report = run(capsys, source, place, "--frameworks", "mlx", "--rungs", "logits")
        assert code == 1 and {each["rung"] for each in report["findings"]} == {"logits"}
    else:
        assert not found["activations"] and not found["logits"]


def moments(t: int = 3, changed: str = "") -> Moments:
    """Of two tensors; one value of ``changed`` is another."""

    def lazy(name: str) -> Tensor:
        array = np.arange(6, dtype=np.float32)
        array[2] += name == changed
        return Tensor(array.shape, array.dtype, lambda: array)

    return Moments({n: lazy(f"m.{n}") for n in ("a", "b")}, {n: lazy(f"v.{n}") for n in ("a", "b")}, t, t)


@pytest.mark.parametrize(
    ("other", "named"),
    [(moments(), []), (moments(changed="v.b"), ["v.b"]), (moments(changed="m.a"), ["m.a"]), (moments(4), ["t"])],
)
def test_moments_that_are_on_both_sides_are_held_together(other: Moments, named: list[str]) -> None:
    report = Report("a", "b")
    verify_tensors.compare_moments(moments(), other, report)
    assert [finding.name for finding in report.findings] == named and report.checked


def test_moments_that_were_left_behind_are_a_note() -> None:
    report = Report("a", "b")
    verify_tensors.compare_moments(moments(), None, report)
    assert report.notes == ["AdamW's moments are in A alone"] and not report.findings and not report.checked


@pytest.mark.usefixtures("here")
def test_the_lowest_bit_is_seen_in_the_tensor_alone(pairs: dict, tmp_path: Path) -> None:
    source, place = pairs["llama"][0], shutil.copytree(pairs["llama"][1], tmp_path / "broken")
    MUTATIONS["the lowest bit of one value"].change(place)
    report = verify(source, place, frameworks=["mlx"])
    assert [(finding.rung, finding.name) for finding in report.findings] == [("tensors", "h.1.mlp.c_fc.weight")]
    assert report.findings[0].message.startswith("1 of 6144 values differ")
    assert verify(source, place, frameworks=["mlx"], rungs=["logits", "gradients", "greedy"]).agrees


def test_both_frameworks_in_processes_of_their_own(pairs: dict) -> None:
    """The same pair, as a user runs it."""
    report = verify(*pairs["llama"])
    assert report.agrees, report.findings
    assert {figure.pair for figure in report.figures} == {
        "A in mlx | B in mlx", "A in torch | B in torch", "A in mlx | B in torch",
    }  # fmt: skip


def test_libraries_judge_a_folder_and_see_what_is_not_there(pairs: dict, tmp_path: Path) -> None:
    place = pairs["llama"][1]
    assert verify(place, f"transformers:{place}", frameworks=["torch"]).agrees
    assert verify(place, f"mlx-lm:{place}", frameworks=["mlx"], rungs=["tensors", "logits", "greedy"]).agrees
    broken = shutil.copytree(place, tmp_path / "broken")
    MUTATIONS["rope_theta dropped"].change(broken)
    report = verify(place, f"transformers:{broken}", frameworks=["torch"], rungs=["logits"])
    assert not report.agrees and any("logits" in str(finding) for finding in report.findings)


@pytest.mark.usefixtures("here")
def test_a_rung_that_was_asked_for_and_cannot_run_is_no_agreement(pairs: dict) -> None:
    place = pairs["llama"][1]
    for rungs, agrees in ((None, True), (["logits", "activations"], False), (["logits", "gradients"], False)):
        report = verify(place, f"mlx-lm:{place}", frameworks=["mlx"], rungs=rungs)
        assert report.agrees is agrees and not report.findings
        reasons = {item.what.split(":")[0]: item for item in report.not_checked}
        for rung in (set(rungs or ("activations", "gradients"))) - {"logits"}:
            assert reasons[rung].reason == "the library does not give them" and reasons[rung].requested is not agrees
    source, converted = pairs["gpt2"]
    assert verify(source, converted, weights_only=True).agrees
    report = verify(source, converted, weights_only=True, rungs=["tensors", "tokenizer"])
    assert not report.agrees and report.not_checked[0].what == "tokenizer" and report.not_checked[0].requested
    report = verify(source, converted, frameworks=["mlx"], rungs=["gradients"])
    assert not report.agrees and report.not_checked[0].what == "logits"


@pytest.mark.usefixtures("here")
def test_a_framework_that_is_not_there(pairs: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = verify_runs.installed
    monkeypatch.setattr(verify_runs, "installed", lambda name: name != "torch" and plain(name))
    report = verify(*pairs["llama"])
    assert report.agrees
    assert [(item.what, item.reason, item.requested) for item in report.not_checked] == [
        ("torch", "not installed: pip install torch", False)
    ]
    assert not verify(*pairs["llama"], frameworks=["mlx", "torch"]).agrees
    monkeypatch.setattr(verify_runs, "installed", lambda name: False)
    report = verify(*pairs["llama"])
    assert not report.agrees and not report.findings
    assert any("no program ran on both sides" in item.reason and item.requested for item in report.not_checked)
    assert verify(*pairs["llama"], weights_only=True).agrees


def test_what_cannot_be_read_is_one_line_and_exit_code_2(
    pairs: dict, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, place = pairs["llama"]
    short = shutil.copytree(place, tmp_path / "short")
    data = (short / "model.safetensors").read_bytes()
    (short / "model.safetensors").write_bytes(data[:-100])
    words = shutil.copytree(place, tmp_path / "words")
    (words / "generation_config.json").write_text("{")
    for args, said in (
        ([source, short], "truncated"),
        ([short, source], "truncated"),
        ([source, words], "generation_config.json: not JSON"),
        ([source, tmp_path / "none"], "none"),
        ([source, place, "--rungs", "logit"], "did you mean 'logits'"),
        ([source, place, "--weights-only", "--frameworks", "mlx"], "--weights-only runs no model"),
        ([source, place, "--html", tmp_path / "none" / "a.html"], "no such folder"),
    ):
        capsys.readouterr()
        assert cli.main(["verify", *map(str, args)]) == 2
        out, err = capsys.readouterr()
        assert not out and err.startswith("mlxgpt: error: ") and err.count("\n") == 1 and said in err, err


HOSTILE = "<script>alert('&')</script>\"><img src=x>"


def hostile() -> Report:
    """A report with everything in it, in names that no page may take for its own."""
    report = Report(HOSTILE, "b")
    report.tensors = [
        Row(f"h.{n}.attn.q_proj.weight.{HOSTILE}", ((32000, 4096), (4096, 32000)), ("float32", "bfloat16"), None,
            ("a" * 64, "b" * 64), n > 0, "A rounded to bfloat16, stored as [in, out] in A")
        for n in range(60)
    ]  # fmt: skip
    report.figures = [
        Figure("gradients", "A in mlx | B in torch", f"x8 {HOSTILE}", np.inf, 1e-5),
        Figure("logits", "A in mlx | B in torch", "x1", 1.234e-5, 1e-5, 2e-6, 3e-9, 0.98765),
    ]
    report.find("tensors", HOSTILE, HOSTILE)
    report.skip(HOSTILE, HOSTILE, True)
    report.notes.append(HOSTILE)
    return report


def test_the_page_is_one_file_and_takes_nothing_for_its_own() -> None:
    page = verify_html.page(hostile())
    assert "<script" not in page and "<img" not in page and "&lt;script&gt;" in page
    assert "src=" not in page.replace("src=x&gt;", "") and "http" not in page and "url(" not in page
    assert page.count('class="bad"') == 1 + 2 + 1 + 1  # a tensor, two figures, a finding, what was not checked


def test_tables_have_80_columns_and_cut_no_name() -> None:
    out = io.StringIO()
    verify_text.show(hostile(), out)
    assert out.getvalue().startswith("does not agree: ")
    first, _, rest = out.getvalue().partition("\n\ntensors (")
    assert "\nfindings\n" in first and rest.rstrip().splitlines()[-1] == first.splitlines()[0]
    lines = rest.rpartition("\n\n")[0].splitlines()
    tables = [line for line in lines if not line.startswith(("(", HOSTILE))]
    assert max(map(len, tables)) <= 80
    assert "q_proj.weight.<script>alert" in "".join(line.split(" ")[0] for line in tables)
    assert any(line.startswith("(1) A rounded to bfloat16, stored as") for line in lines)
    assert "20 more agree" in lines[0]


@pytest.mark.usefixtures("here")
def test_what_the_documentation_of_the_module_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = models.tiny(family="gpt2", n_embd=64, activation="gelu")
    model_folder.write_model(tmp_path / "a", config, models.weights(config))
    (tmp_path / "out").mkdir()
    convert_model(tmp_path / "a", tmp_path / "out" / "ckpt.pt")
    monkeypatch.chdir(tmp_path)
    shown = (convert.verify.__doc__ or "").split("\n\n", 1)[1]
    assert shown.count("verify(") >= 4
    exec(shown, {})
