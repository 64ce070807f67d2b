"""What lm-evaluation-harness asks for the rows of task_rows.py: the digests that test_task_*.py expect.

Needs lm_eval 0.4.13 and datasets; run as ``python tests/lm_eval_requests.py``.
"""

import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import datasets as hub_datasets  # type: ignore[import-not-found]
import lm_eval  # type: ignore[import-not-found]
from lm_eval.api.task import ConfigurableTask  # type: ignore[import-not-found]
from lm_eval.tasks._yaml_loader import load_yaml  # type: ignore[import-not-found]
from task_rows import YAMLS, datasets, write_yamls

PLAIN = ConfigurableTask.download


def digest(config: dict[str, Any], shots: int, show: bool = False) -> str:
    """Of the texts that a task asks, in order."""
    task = ConfigurableTask(config=config)
    task.set_config("num_fewshot", shots)
    task.set_fewshot_seed(1234)
    task.build_all_requests()
    asked = [[part for part in each.args if isinstance(part, str)] for each in task.instances]
    if show:
        print(asked[0])
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:16]


def published() -> None:
    """Prints the digests of the published tasks."""
    rows = datasets()

    def download(self, kwargs=None, **more) -> None:
        splits = rows[self.config.task][1]
        self.dataset = hub_datasets.DatasetDict(
            {name: hub_datasets.Dataset.from_list(each or splits["test"]) for name, each in splits.items()}
        )

    ConfigurableTask.download = download
    for name, (file, _) in rows.items():
        shots = (0,) if name.startswith("crows") else (0, 1, 3)
        config = load_yaml(Path(str(lm_eval.__file__)).parent / "tasks" / file)
        print(f'    "{name}": {tuple(digest(dict(config), count, count == 1) for count in shots)},')


def of_yamls() -> None:
    """Prints the digests of the tasks in YAML."""
    ConfigurableTask.download = PLAIN
    with tempfile.TemporaryDirectory() as folder:
        write_yamls(Path(folder))
        os.chdir(folder)
        for name in YAMLS:
            shots = (0,) if name == "text" else (0, 2)
            print(f'    "{name}": {tuple(digest(load_yaml(f"{name}.yaml"), count, count == 2) for count in shots)},')


if __name__ == "__main__":
    published()
    of_yamls()
