"""Random faults in the bytes of files, in their structure where it is one that is known here."""

import copy
import io
import json
import random
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from convert.formats.gguf.file import Value, read_gguf, write_gguf

SWAPS: list[Any] = [
    None,
    True,
    False,
    -1,
    0,
    1,
    2,
    3.5,
    1e308,
    2**31,
    2**63,
    2**70,
    "",
    "x",
    "../x",
    [],
    {},
    [1],
    {"a": 1},
]
SWAPS += ["gpt2", "float32", "F32", float("nan"), float("inf"), "\ud800", "a" * 5000, [[]] * 50]
NUMBERS = [
    0,
    1,
    2,
    3,
    7,
    127,
    128,
    255,
    256,
    65535,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**33,
    2**40,
    2**63 - 1,
    2**63,
    2**64 - 1,
]


def typed(value: Any) -> Value:
    """Metadata as it is written."""
    if isinstance(value, np.ndarray):
        return Value({"f": "f", "u": "u", "i": "i"}[value.dtype.kind] + f"{value.dtype.itemsize * 8}[]", value)
    if isinstance(value, list):
        return Value("bool[]" if value and isinstance(value[0], bool) else "str[]", value)
    if isinstance(value, int) and not isinstance(value, bool):
        return Value("u64" if value >= 2**32 else "i64" if value < 0 else "u32", value)
    return Value("bool" if isinstance(value, bool) else "str" if isinstance(value, str) else "f32", value)


def damaged(data: bytes, name: str, rng: random.Random) -> bytes:
    """The bytes of a file with one to three faults, in its structure where it has one that is known here."""
    try:
        if name.endswith(".json") and rng.random() < 0.7:
            return json.dumps(damaged_json(json.loads(data), rng)).encode("utf-8", "surrogatepass")
        if name.endswith(".safetensors") and rng.random() < 0.6:
            length = int.from_bytes(data[:8], "little")
            text = json.dumps(damaged_json(json.loads(data[8 : 8 + length]), rng)).encode("utf-8", "surrogatepass")
            return len(text).to_bytes(8, "little") + text + data[8 + length :]
        if data[:2] == b"PK" and rng.random() < 0.8:
            return damaged_zip(data, rng)
        if data[:4] == b"GGUF" and rng.random() < 0.5:
            return damaged_gguf(data, rng)
    except Exception:  # the structure is lost already, or this fault cannot be written
        pass
    return damaged_bytes(data, rng, 512 if rng.random() < 0.7 else len(data))


def damaged_json(value: Any, rng: random.Random) -> Any:
    value = copy.deepcopy(value)
    for _ in range(rng.randint(1, 2)):
        at, parents = value, []
        while isinstance(at, dict | list) and at and (not parents or rng.random() < 0.8):
            key = rng.choice(list(at)) if isinstance(at, dict) else rng.randrange(len(at))
            parents.append((at, key))
            at = at[key]
        if not parents:
            return rng.choice(SWAPS)
        holder, key = parents[-1]
        fault = rng.random()
        if fault < 0.2:
            del holder[key]
        elif fault < 0.4 and isinstance(holder[key], int | float) and not isinstance(holder[key], bool):
            holder[key] = holder[key] * rng.choice([-1, 2, 3, 0.5]) + rng.choice([0, 1, -1])
        elif fault < 0.5 and isinstance(holder, dict):
            holder[rng.choice(["x", f"{key}x", ""])] = holder[key]
        else:
            holder[key] = copy.deepcopy(rng.choice(SWAPS))
    return value


def damaged_zip(data: bytes, rng: random.Random) -> bytes:
    """One member damaged, or gone, or of another name: the sums are right again."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w") as new:
        chosen = rng.choice(old.namelist()) if rng.random() < 0.5 else next(
            (name for name in old.namelist() if name.endswith(".pkl")), old.namelist()[0]
        )  # fmt: skip
        for name in old.namelist():
            content = old.read(name)
            if name == chosen:
                fault = rng.random()
                if fault < 0.05:
                    continue
                name = name + "x" if fault < 0.1 else name
                content = damaged_bytes(content, rng, len(content)) if fault >= 0.1 else content
            new.writestr(name, content)
    return out.getvalue()


def damaged_gguf(data: bytes, rng: random.Random) -> bytes:
    """One value of the metadata damaged, or a tensor of another name or shape; the offsets are right again."""
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "a.gguf"
        path.write_bytes(data)
        values, stored = read_gguf(path)
        tensors = {name: (one.type, one.shape) for name, one in stored.items()}
        blobs = {name: np.frombuffer(data[one.start : one.stop], np.uint8) for name, one in stored.items()}
        key = rng.choice(list(values))
        fault = rng.random()
        if fault < 0.15:
            del values[key]
        elif fault < 0.6 or isinstance(values[key], int | float):
            values[key] = rng.choice([*SWAPS[:11], *NUMBERS, "x", ["a", "b"], np.zeros(3, np.float32)])
        elif isinstance(values[key], str):
            text = damaged(values[key].encode(), "a.json" if values[key][:1] == "{" else "", rng)
            values[key] = text.decode("utf-8", "replace")
        elif len(values[key]):
            values[key] = copy.copy(values[key])
            at = rng.randrange(len(values[key]))
            values[key][at] = values[key][rng.randrange(len(values[key]))]
        if rng.random() < 0.2:
            name = rng.choice(list(tensors))
            tensors[name] = tensors[name][0], tensors[name][1][::-1]
        metadata = {name: typed(value) for name, value in values.items() if value is not None}
        with np.errstate(over="ignore"):
            write_gguf(path, metadata, tensors, lambda name: iter([blobs[name]]))
        return path.read_bytes()


def damaged_bytes(data: bytes, rng: random.Random, reach: int) -> bytes:
    """Faults among the first ``reach`` bytes: flipped bits, numbers, cuts, pieces twice or elsewhere."""
    made = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        if not made:
            return bytes(rng.randrange(256) for _ in range(rng.randrange(20)))
        at = rng.randrange(min(reach, len(made)))
        fault = rng.randrange(7)
        if fault == 0:
            made[at] ^= 1 << rng.randrange(8)
        elif fault == 1:
            made[at] = rng.choice([0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)])
        elif fault == 2:
            width = rng.choice([1, 2, 4, 8])
            number = rng.choice(NUMBERS) % (1 << 8 * width)
            made[at : at + width] = number.to_bytes(width, "little")
        elif fault == 3:
            del made[at:]
        elif fault == 4:
            del made[at : at + rng.randint(1, 16)]
        elif fault == 5:
            start = rng.randrange(len(made))
            made[at:at] = made[start : start + rng.randint(1, 64)]
        else:
            start = rng.randrange(len(made))
            piece = made[start : start + rng.randint(1, 32)]
            made[at : at + len(piece)] = piece
    return bytes(made)
