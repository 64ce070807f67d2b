"""An instruction data set from Python's own docstrings: "What does os.path.join do?" and the first paragraph.

Made from the documents of pydocs.py, so nothing is imported and nothing downloaded; private names are left out.
"""

import hashlib
import json
import platform
import re
from collections.abc import Iterator
from pathlib import Path

from mlxgpt.common.data import pydocs
from mlxgpt.common.data.prepare import cache_folder
from mlxgpt.common.files import atomic_write

NAME = "pydocs-qa"
LONGEST = 240  # characters of an answer; longer first paragraphs do not answer the question
_WORDS = re.compile(r"[A-Za-z]{2,}")


def rows() -> Iterator[dict[str, str]]:
    """{prompt, completion} of every public name whose docstring begins with a sentence, sorted by name."""
    for name, text in pydocs.documents():
        header, _, body = text.partition("\n\n")
        answer = " ".join(body.partition("\n\n")[0].split())
        private = any(part.startswith("_") for part in name.split("."))
        if private or name.startswith("topic ") or len(answer) > LONGEST or len(_WORDS.findall(answer)) < 3:
            continue
        name = re.sub(r"^posixpath\.", "os.path.", name)  # as it is imported
        question = f"What does {name} do?\n" if header.endswith(")") else f"What is {name}?\n"
        yield {"prompt": question, "completion": answer}


def file() -> Path:
    """The rows as a file in the cache folder, made at first use; its name has a digest of its content."""
    content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows()).encode()
    digest = hashlib.sha256(content).hexdigest()[:12]
    place = cache_folder() / f"{NAME}-{platform.python_version()}-{digest}" / f"{NAME}.jsonl"
    if not place.is_file():
        place.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(place) as opened:
            opened.write(content)
    return place
