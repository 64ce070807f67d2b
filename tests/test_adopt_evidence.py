"""A sample of a user's model: what is read, and what is refused or remarked in one line."""

import re
from collections import OrderedDict
from pathlib import Path
from typing import Any

import ml_dtypes
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from convert.adopt import evidence
from mlxgpt.common.errors import UserError

ROOT = Path(__file__).parent.parent
B, T, V, C = 2, 32, 13, 8
RNG = np.random.default_rng(0)
IDS = RNG.integers(0, V, (B, T))
LOGITS = RNG.normal(size=(B, T, V)).astype(np.float32)
HIDDEN = RNG.normal(size=(3, B, T, C)).astype(np.float32)


def saved(tmp_path: Path, **arrays: Any) -> Path:
    np.savez(tmp_path / "sample.npz", **arrays)
    return tmp_path / "sample.npz"


def test_a_sample_is_read_as_it_was_made(tmp_path: Path) -> None:
    found = evidence.read(saved(tmp_path, ids=IDS, logits=LOGITS, hidden=HIDDEN))
    assert found.ids.dtype == np.int32 and np.array_equal(found.ids, IDS)
    assert np.array_equal(found.logits, LOGITS) and not found.last and not found.normalized
    assert found.hidden is not None and np.array_equal(np.stack(found.hidden), HIDDEN)
    assert found.dtype == "float32" and found.notes == () and found.vocab_size == V


@pytest.mark.parametrize("name", ["tokens", "input_ids"])
def test_a_batch_of_one_needs_no_axis(tmp_path: Path, name: str) -> None:
    found = evidence.read(saved(tmp_path, **{name: IDS[0]}, logits=LOGITS[0], hidden=HIDDEN[:, 0]))
    assert found.ids.shape == (1, T) and np.array_equal(found.logits, LOGITS[:1])
    assert found.hidden is not None and np.array_equal(np.stack(found.hidden), HIDDEN[:, :1])


@pytest.mark.parametrize("spelled", ["hidden.{}", "hidden_{}", "hidden{}", "hidden_states.{}"])
def test_hidden_states_one_by_one(tmp_path: Path, spelled: str) -> None:
    states = {spelled.format(n): state for n, state in enumerate(HIDDEN)}
    found = evidence.read(saved(tmp_path, ids=IDS, logits=LOGITS, **states))
    assert found.hidden is not None and np.array_equal(np.stack(found.hidden), HIDDEN)


@pytest.mark.parametrize("shape", [(B, V), (B, 1, V)])
def test_logits_of_the_last_position_alone(tmp_path: Path, shape: tuple[int, ...]) -> None:
    found = evidence.read(saved(tmp_path, ids=IDS, logits=LOGITS[:, -1].reshape(shape)))
    assert found.last and np.array_equal(found.logits, LOGITS[:, -1])
    assert np.array_equal(found.comparable(LOGITS), LOGITS[:, -1])
    assert any("last position alone" in note for note in found.notes)


def test_logits_that_were_flattened_for_the_loss(tmp_path: Path) -> None:
    found = evidence.read(saved(tmp_path, ids=IDS, logits=LOGITS.reshape(-1, V)))
    assert np.array_equal(found.logits, LOGITS)


def test_log_probabilities_are_compared_as_such(tmp_path: Path) -> None:
    given = torch.log_softmax(torch.from_numpy(LOGITS), -1)
    found = evidence.read(saved(tmp_path, ids=IDS, logits=given.numpy()))
    assert found.normalized and any("log-probabilities" in note for note in found.notes)
    np.testing.assert_allclose(found.comparable(LOGITS + 7), found.logits, atol=1e-5)
    probable = evidence.read(saved(tmp_path, ids=IDS, logits=given.exp().numpy()))
    assert probable.normalized
    np.testing.assert_allclose(probable.logits, found.logits, atol=1e-5)


def test_other_files_hold_the_same(tmp_path: Path) -> None:
    expected = evidence.read(saved(tmp_path, ids=IDS, logits=LOGITS, hidden=HIDDEN))
    states = [torch.from_numpy(state) for state in HIDDEN]
    content = {"ids": torch.from_numpy(IDS), "logits": torch.from_numpy(LOGITS), "hidden": states, "by": "me"}
    torch.save(content, tmp_path / "sample.pt")
    save_file({"ids": IDS, "logits": LOGITS, "hidden": HIDDEN}, tmp_path / "sample.safetensors")
    torch.save(content | {"ids": IDS[0].tolist(), "logits": content["logits"][0], "hidden": None}, tmp_path / "list.pt")
    assert np.array_equal(evidence.read(tmp_path / "list.pt").ids, IDS[:1])
    for name in ("sample.pt", "sample.safetensors"):
        found = evidence.read(tmp_path / name)
        assert np.array_equal(found.ids, expected.ids) and np.array_equal(found.logits, expected.logits)
        assert found.hidden is not None and np.array_equal(np.stack(found.hidden), HIDDEN)


@pytest.mark.parametrize("kind", [np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("widened", [True, False])
def test_a_half_sample_is_remarked(tmp_path: Path, kind: Any, widened: bool) -> None:
    given = LOGITS.astype(kind)
    given = given.astype(np.float32) if widened else given
    found = evidence.read(saved(tmp_path, ids=IDS, logits=given))
    assert found.dtype == np.dtype(kind).name and found.step > 2.0**-24
    assert any(f"the logits are {found.dtype}" in note for note in found.notes)


@pytest.mark.parametrize(
    ("ids", "said"),
    [
        (np.full((1, T), 3), "the same one"),
        (IDS[:1, :5], "5 tokens"),
        (np.array([[0, 1] * (T // 2)]), "2 different tokens"),
    ],
)
def test_a_sample_that_says_little_is_remarked(tmp_path: Path, ids: np.ndarray, said: str) -> None:
    found = evidence.read(saved(tmp_path, ids=ids, logits=LOGITS[:1, : ids.shape[1]]))
    assert any(said in note for note in found.notes), found.notes


def nan(array: np.ndarray) -> np.ndarray:
    made = array.copy()
    made.flat[3] = np.nan
    return made


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"logits": LOGITS}, "no ids: holds logits"),
        ({"ids": IDS}, "no logits: holds ids"),
        ({"ids": IDS[:, :0], "logits": LOGITS[:, :0]}, "no tokens"),
        ({"ids": IDS + 0.5, "logits": LOGITS}, "whole numbers"),
        ({"ids": -IDS - 1, "logits": LOGITS}, "is no token id"),
        ({"ids": IDS[:, :-1], "logits": LOGITS}, "logits (2, 32, 13) for ids (2, 31): expected (2, 31, V)"),
        ({"ids": IDS, "logits": LOGITS.transpose(0, 2, 1)}, "transposed?"),
        ({"ids": IDS, "logits": LOGITS.astype(int)}, "are int64, expected floats"),
        ({"ids": IDS, "logits": nan(LOGITS)}, "1 of 832 values are not finite"),
        ({"ids": IDS, "logits": np.zeros_like(LOGITS)}, "0 everywhere"),
        ({"ids": IDS, "logits": LOGITS, "hidden": nan(HIDDEN)}, "hidden[0]: 1 of"),
        ({"ids": IDS, "logits": LOGITS, "hidden": HIDDEN[:, :, 1:]}, "hidden[0] (2, 31, 8)"),
        ({"ids": IDS, "logits": LOGITS, "hidden.0": HIDDEN[0], "hidden.2": HIDDEN[2]}, "no hidden.1"),
        ({"ids": IDS, "logits": np.array([object()])}, "logits: Python objects, which are never unpickled"),
    ],
)
def test_a_sample_that_cannot_be_used_is_refused(tmp_path: Path, arrays: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as error:
        evidence.read(saved(tmp_path, **arrays))
    assert said in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ({"vocab_size": 12}, "the largest is 12, but the vocabulary has 12"),
        ({"vocab_size": 14}, "logits of 13 tokens, but the vocabulary has 14"),
        ({"vocab_size": V, "n_layer": 3}, "3 hidden states, expected 4"),
        ({"vocab_size": V, "n_embd": 9}, "hidden states of 8 numbers, expected 9"),
        ({"vocab_size": V, "block_size": 31}, "32 tokens, but the context holds 31"),
    ],
)
def test_a_sample_of_another_model_is_refused(sizes: dict[str, int], said: str) -> None:
    sample = evidence.of_arrays({"ids": IDS, "logits": LOGITS, "hidden": HIDDEN}, "sample.npz")
    sample.check(vocab_size=V, n_layer=2, n_embd=C, block_size=T)
    with pytest.raises(UserError, match=said):
        sample.check(**sizes)


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    good = saved(tmp_path, ids=IDS, logits=LOGITS).read_bytes()
    for content in (good[:500], good[:-30], b"", b"text", good.replace(b"(2, 32, 13)", b"(9, 99, 99)")):
        (tmp_path / "bad.npz").write_bytes(content)
        with pytest.raises(UserError, match=r"bad\.npz"):
            evidence.read(tmp_path / "bad.npz")
    for place in (tmp_path, tmp_path / "none.npz"):
        with pytest.raises(UserError):
            evidence.read(place)


def test_an_absurd_size_is_refused_before_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = saved(tmp_path, ids=IDS, logits=LOGITS)
    monkeypatch.setattr(evidence, "LARGEST", 100)
    with pytest.raises(UserError, match="a few dozen tokens"):
        evidence.read(place)


def test_the_lines_of_the_documentation_make_a_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each fence of docs/adopt.md on a model that is a table, or blocks of linear layers."""
    monkeypatch.chdir(tmp_path)
    fences = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "adopt.md").read_text(), re.DOTALL)
    torch.manual_seed(0)
    table, blocks = torch.nn.Embedding(V, V), torch.nn.Sequential(torch.nn.Linear(V, V), torch.nn.Linear(V, V))
    hooked = torch.nn.Sequential(OrderedDict(table=table, blocks=blocks))
    values = mx.array(table.weight.detach().numpy())
    found = []
    for fence, model in zip(fences, (table, nn.Embedding(V, V), None, hooked), strict=True):
        if isinstance(model, nn.Embedding):
            model.weight = values
        space = {"np": np, "torch": torch, "mx": mx, "model": model, "vocab_size": V, "params": np.array(values)}
        exec(fence, space | {"forward": lambda params, ids: params[ids], "ids": torch.from_numpy(IDS)})
        found.append(evidence.read("sample.npz"))
    for each in found[:3]:
        assert np.array_equal(each.logits, np.array(values)[each.ids]) and each.notes == ()
    states = found[3].hidden
    assert states and len(states) == 3 and np.array_equal(states[2], found[3].logits)
