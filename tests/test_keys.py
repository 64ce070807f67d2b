"""docs/training.md lists every recipe key, its default and meaning; ``python tests/test_keys.py`` rewrites the list."""

import dataclasses
import sys
from pathlib import Path

from mlxgpt.common.keys import SECTIONS, default_of
from mlxgpt.common.train import resume

PAGE = Path(__file__).resolve().parent.parent / "docs/training.md"
BEGIN, END = "<!-- keys: begin -->\n", "<!-- keys: end -->"


def table() -> str:
    """A row a key: name, default, whether a resumed run may change it, meaning."""
    lines = ["| key | default | on resume | meaning |", "|---|---|---|---|"]
    for section, kind in SECTIONS.items():
        for field in dataclasses.fields(kind):
            key = f"{section}.{field.name}"
            value = default_of(field)
            default = str(value).lower() if isinstance(value, bool) else repr(value)
            meaning = field.metadata["help"].replace("|", "\\|")
            lines.append(f"| `{key}` | `{default}` | {resume.may_change(key)} | {meaning} |")
    return "\n".join(lines) + "\n"


def test_the_table_of_keys_is_that_of_the_dataclasses() -> None:
    before, _, rest = PAGE.read_text().partition(BEGIN)
    found, _, after = rest.partition(END)
    assert before and after
    assert found == table(), "python tests/test_keys.py rewrites it"


def test_the_rules_of_resuming_name_real_keys() -> None:
    known = {f"{section}.{field.name}" for section, kind in SECTIONS.items() for field in dataclasses.fields(kind)}
    assert known >= resume.ACCEPTED >= resume.ROUNDING


if __name__ == "__main__":
    before, _, rest = PAGE.read_text().partition(BEGIN)
    PAGE.write_text(before + BEGIN + table() + END + rest.partition(END)[2])
    sys.exit(0)
