"""safetensors files against the library that defines them; damage is refused, a failed write changes nothing."""

import json
import re
import struct
from pathlib import Path
from typing import Any

import ml_dtypes
import mlx.core as mx
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from mlxgpt.common.errors import UserError
from mlxgpt.common.files import atomic_write
from mlxgpt.common.folders import tensors


def refusal(call: Any, *args: Any) -> str:
    with pytest.raises(UserError) as caught:
        call(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_failed_write_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    tensors.write_tensors(path, {"a": np.ones(3)})
    before = path.read_bytes()
    with pytest.raises(RuntimeError), atomic_write(path) as file:
        file.write(b"half")
        raise RuntimeError
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
    assert refusal(tensors.write_tensors, tmp_path / "none" / "a", {}) == (
        f"{tmp_path / 'none' / 'a'}: cannot write: No such file or directory"
    )
    assert refusal(tensors.write_tensors, path, {"a": np.ones(2, np.complex64)}).startswith(
        f"{path}: a: dtype complex64: expected one of F64, "
    )


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that the examples of one property share."""
    return tmp_path_factory.mktemp("scratch")


# the library's numpy half does not read fp8; test_quantized_inputs.py does
_PLAIN = sorted(name for name in tensors.DTYPES if not name.startswith("F8_"))
ARRAYS = st.dictionaries(
    st.text(max_size=4).filter(lambda name: name.isprintable() and name != "__metadata__"),
    st.tuples(st.sampled_from(_PLAIN), st.lists(st.integers(0, 3), max_size=3)),
    max_size=4,
)


@given(spec=ARRAYS)
@settings(max_examples=60, deadline=None, database=None)
def test_every_type_and_shape_is_what_the_safetensors_library_reads(scratch: Path, spec: dict[str, Any]) -> None:
    rng = np.random.default_rng(0)
    arrays = {}
    for name, (dtype, shape) in spec.items():
        arrays[name] = rng.integers(0, 2, shape).astype(tensors.DTYPES[dtype]).T
    path = scratch / "a.safetensors"
    for write in (
        tensors.write_tensors,
        lambda path, made: safetensors.numpy.save_file({n: np.array(a, order="C") for n, a in made.items()}, path),
    ):
        write(path, arrays)
        for found in (tensors.read_tensors(path), safetensors.numpy.load_file(path)):
            assert found.keys() == arrays.keys()
            for name, array in arrays.items():
                assert found[name].dtype == array.dtype and np.array_equal(found[name], array)


def test_an_mlx_file_without_metadata_or_padding_reads(tmp_path: Path) -> None:
    mx.save_safetensors(str(tmp_path / "a.safetensors"), {"a": mx.arange(5, dtype=mx.bfloat16), "b": mx.array(3.5)})
    found = tensors.read_tensors(tmp_path / "a.safetensors")
    assert found["a"].tolist() == [0, 1, 2, 3, 4] and found["a"].dtype == ml_dtypes.bfloat16 and found["b"] == 3.5


def file_of(header: Any, data: bytes = b"\0" * 8, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def line(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


BROKEN = [
    (b"", "truncated or not safetensors: header of 0 bytes in a file of 0 bytes"),
    (b"\x02\0\0", "truncated or not safetensors: header of 2 bytes in a file of 3 bytes"),
    (
        file_of({"a": line()}, length=10**6),
        "truncated or not safetensors: header of 1000000 bytes in a file of 77 bytes",
    ),
    (
        file_of({"a": line()}, length=2**63),
        f"truncated or not safetensors: header of {2**63} bytes in a file of 77 bytes",
    ),
    (file_of(b"{nonsense"), "header is not JSON: .*"),
    (file_of(b"\xff\xff"), "header is not JSON: .*"),
    (file_of(b'{"a":1,"a":2}'), "header is not JSON: a name occurs twice"),
    (file_of(b"[" * 10000), "header is not JSON: .*"),
    (file_of([1]), "header is list, expected an object"),
    (file_of({"__metadata__": {"format": 1}}), "__metadata__ in the header: expected strings by name"),
    (file_of({"a": 3}), "a: expected dtype, shape and data_offsets in the header"),
    (file_of({"a": line() | {"more": 1}}), "a: expected dtype, shape and data_offsets in the header"),
    (file_of({"a": line(dtype="F6_E2M3")}), "a: dtype 'F6_E2M3': expected one of F64, F32, .*"),
    (file_of({"a": line(dtype=["F32"])}), r"a: dtype \['F32'\]: expected one of F64, F32, .*"),
    (file_of({"a": line(shape=[-2])}), "a: shape and data_offsets in the header: expected whole numbers, at least 0"),
    (file_of({"a": line(shape=[2.0])}), "a: shape and data_offsets in the header: expected whole numbers, at least 0"),
    (
        file_of({"a": line(offsets=[0, 8, 8])}),
        "a: shape and data_offsets in the header: expected whole numbers, at least 0",
    ),
    (file_of({"a": line(shape=[3])}), r"a: 8 bytes for F32 \[3\], expected 12"),
    (file_of({"a": line(offsets=[8, 0])}), r"a: -8 bytes for F32 \[2\], expected 8"),
    (file_of({"a": line(shape=[2**40, 2**40])}), r"a: 8 bytes for F32 .*, expected \d+"),
    (file_of({"a": line()}, b"\0" * 7), "a: truncated: data ends at byte 77 of a file of 76 bytes"),
    (file_of({"a": line()}, b"\0" * 9), "78 bytes long, expected 77 by its header"),
    (file_of({"a": line(), "b": line()}), "b: data starts at byte .*, expected .*, where the one before ends"),
    (
        file_of({"a": line(offsets=[8, 16])}, b"\0" * 16),
        "a: data starts at byte .*, expected .*, where the one before ends",
    ),
]


@pytest.mark.parametrize(("content", "message"), BROKEN)
def test_a_header_that_lies_is_refused(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    found = refusal(tensors.read_tensors, path)
    assert re.fullmatch(f"{re.escape(str(path))}: {message}", found), found


def test_a_file_that_shrinks_while_it_is_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    tensors.write_tensors(path, {"a": np.ones(100)})
    entry = tensors.read_header(path)[0]["a"]
    path.write_bytes(path.read_bytes()[:-8])
    assert refusal(tensors.read_tensor, entry) == f"{path}: truncated while it was read"


@given(
    flips=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=3),
    cut=st.integers(0, 40),
    header_only=st.booleans(),
)
@settings(max_examples=400, deadline=None, database=None)
def test_no_damage_reads_as_something_else_than_the_library_reads(
    scratch: Path, flips: list[tuple[int, int]], cut: int, header_only: bool
) -> None:
    path = scratch / "b.safetensors"
    content = bytearray(file_of({"ab": line("BF16", [4]), "c": line("U8", [], [8, 9])}, bytes(range(9))))
    for at, value in flips:
        content[at % (len(content) - (9 if header_only else 0))] = value
    path.write_bytes(content[: len(content) - cut % 7 if cut % 5 == 0 else len(content)])
    try:
        found = tensors.read_tensors(path)
    except UserError as error:
        assert str(error).startswith(f"{path}: ")
        return
    expected = safetensors.numpy.load_file(path)
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == array.dtype and found[name].tobytes() == array.tobytes()
