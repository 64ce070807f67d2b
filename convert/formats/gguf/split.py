"""GGUF models that lie in several files, NAME-00001-of-00003.gguf and so on, as llama.cpp's gguf-split makes them.

The first has the metadata; ``split.no`` counts the files from 0, ``split.count`` says how many there are, and
``split.tensors.count`` how many tensors all of them hold.
"""

import re
from pathlib import Path
from typing import Any

from convert.formats.gguf.file import Stored, read_gguf
from mlxgpt.common.errors import UserError

_NAME = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")
_NO, _COUNT, _TENSORS = "split.no", "split.count", "split.tensors.count"


def read_parts(path: Path) -> tuple[dict[str, Any], dict[str, Stored], tuple[Path, ...]]:
    """Metadata, tensors and files of a model, of which ``path`` is the file or any of several.

    Raises:
        UserError: see ``read_gguf``; a file is missing, or does not belong to the others.
    """
    values, stored = read_gguf(path)
    count = values.get(_COUNT, 1)
    if type(count) is not int or not 1 <= count <= 99999:
        raise UserError(f"{path}: {_COUNT} = {count!r}: expected 1 to 99999")
    if count == 1:
        return values, stored, (path,)
    name = _NAME.fullmatch(path.name)
    if name is None or int(name[3]) != count:
        expected = f"NAME-00001-of-{count:05}.gguf"
        raise UserError(f"{path}: one of {count} files ({_COUNT}), which are found by their names: expected {expected}")
    parts = tuple(path.with_name(f"{name[1]}-{number:05}-of-{count:05}.gguf") for number in range(1, count + 1))
    missing = [part.name for part in parts if not part.is_file()]
    if missing:
        shown = ", ".join(missing[:3]) + (" ..." if len(missing) > 3 else "")
        raise UserError(f"{path}: {len(missing)} of its {count} files are not beside it: {shown}")
    made: dict[str, Any] = {}
    tensors: dict[str, Stored] = {}
    for number, part in enumerate(parts):
        its_values, its_tensors = (values, stored) if part == path else read_gguf(part)
        if (its_values.get(_NO), its_values.get(_COUNT)) != (number, count):
            found = f"{_NO} {its_values.get(_NO)}, {_COUNT} {its_values.get(_COUNT)}"
            raise UserError(f"{part}: {found}: expected {number} and {count} by its name")
        both = next((name for name in its_tensors if name in tensors), None)
        if both is not None:
            raise UserError(f"{part}: tensor {both} is in {tensors[both].path.name} too")
        tensors |= its_tensors
        made = {**its_values, **made}
    if made.get(_TENSORS, len(tensors)) != len(tensors):
        raise UserError(f"{path}: {_TENSORS} = {made[_TENSORS]}: the {count} files have {len(tensors)}")
    return made, tensors, parts
