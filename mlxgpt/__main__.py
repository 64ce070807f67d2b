"""``python -m mlxgpt VERB``."""

import sys

from mlxgpt.cli import main

sys.exit(main())
