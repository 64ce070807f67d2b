"""``python -m torch_ref VERB``: the same commands with --backend torch."""

import sys

from mlxgpt.cli import main

sys.exit(main(backend="torch"))
