"""Chat rows, templates of ChatML's form that read them, and what of them is trained."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from mlxgpt.common.config import TuneConfig
from mlxgpt.common.errors import UserError
from mlxgpt.common.rows.formats import open_rows
from mlxgpt.common.rows.row import Row
from mlxgpt.common.sft.encode import Encoder
from mlxgpt.common.sft.template import Template

IM = ["<|im_start|>", "<|im_end|>"]
_TURNS = "{{% for m in messages %}}{{{{ '<|im_start|>' + m.role + '\\n' }}}}{}{{{{ '<|im_end|>\\n' }}}}{{% endfor %}}"
_ASK = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"


def turns(body: str) -> str:
    """A template of ChatML's form whose messages are written by ``body``."""
    return _TURNS.format(body) + _ASK


def reasons(name: str) -> str:
    return turns("{% if m." + name + " %}{{ '<think>' + m." + name + " + '</think>' }}{% endif %}{{ m.content }}")


PARTS = turns("{% for part in m.content %}{{ part.text }}{% endfor %}")
EITHER = turns(
    "{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}{{ p.text }}{% endfor %}{% endif %}"
)
_CALLS = "{{ m.content }}{% for call in m.tool_calls or [] %}{{ call.function.name + ' ' }}"
OBJECTS = turns(_CALLS + "{{ call.function.arguments | tojson }}{% endfor %}")
ITEMS = turns(_CALLS + "{% for k, v in call.function.arguments.items() %}{{ k ~ '=' ~ v }}{% endfor %}{% endfor %}")
JOINED = turns(_CALLS + "{{ call.function.arguments + '' }}{% endfor %}")  # as DeepSeek's
PRINTED = turns(_CALLS + "{{ call.function.arguments }}{% endfor %}")
THINKS = turns("{% if thinks is defined and not thinks %}{{ 'quick ' }}{% endif %}{{ m.content }}")


def template(tokenizer: Any, source: str, **kwargs: Any) -> Template:
    return Template({"default": source}, tokenizer, tokenizer.named, "the template", kwargs=kwargs)


def write(path: Path, *rows: Any) -> Path:
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def opened(path: Path, **tune: Any) -> list[Row]:
    rows = open_rows(TuneConfig(source=str(path), **tune)).splits
    return sorted([*rows["train"], *rows["valid"]], key=lambda row: int(row.where.split()[-1]))


def refused(path: Path, **tune: Any) -> str:
    with pytest.raises(UserError) as caught:
        opened(path, **tune)
    assert "\n" not in str(caught.value)
    return str(caught.value).replace(str(path), "FILE")


def trained(found: Template, *rows: Row, **tune: Any) -> list[list[str]]:
    """Of each example the texts that are trained on."""
    examples, _ = Encoder(TuneConfig(**tune), found.tokenizer, found, 1024).examples(rows)
    made = []
    for one in examples:
        asked = np.flatnonzero(np.diff(np.concatenate([[0], one.weights > 0, [0]]).astype(int))).reshape(-1, 2)
        made.append([found.tokenizer.decode(one.targets[a:b].tolist()) for a, b in asked.tolist()])
    return made


def said(*contents: str, **last: Any) -> list[dict[str, Any]]:
    """User and assistant in turns; ``last`` are further keys of the last message."""
    made: list[dict[str, Any]] = [
        {"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(contents)
    ]
    made[-1] |= last
    return made
