"""/openapi.json of mlxgpt serve is true: what schemathesis makes of it, and what the hostile table has."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest
from serve_site import Site, serving_site
from serving import running
from test_serve_hostile import BODIES, CHAT, TEXT, tiny

from mlxgpt.common.serve.web.settings import Settings

KEY = "sk-schema"
# not positive_data_acceptance: a schema has no words for a prompt past the context, or names that a template reads
LEFT_OUT = "positive_data_acceptance"


@pytest.fixture(scope="module")
def site() -> Any:
    with running("mlx", tiny, max_batch=4) as engine, serving_site(engine, Settings(keys=(KEY,))) as made:
        yield made


@pytest.mark.parametrize("examples", (2, pytest.param(60, marks=pytest.mark.slow)))
def test_schemathesis_finds_nothing(site: Site, tmp_path: Path, examples: int) -> None:
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"http://127.0.0.1:{site.port}/openapi.json"]
    command += ["--header", f"Authorization: Bearer {KEY}", "--phases", "fuzzing", "--max-examples", str(examples)]
    command += ["--exclude-checks", LEFT_OUT, "--suppress-health-check", "all", "--generation-database", "none"]
    command += ["--seed", "1", "--no-color"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "9 passed" in run.stdout
    assert site.log.statuses[500] == 0 and site.log.statuses[200] > 9 and site.log.statuses[400] > 1
    assert site.worker.death is None


# what it cannot say: lengths in tokens, names of this model, what a text must hold, schemas in schemas
UNSAID = {"a prompt past the context", "1,000 prompts", "10,000 messages", "logit_bias past the vocabulary",
          "kwargs of the template", "every token forbidden", "arguments that are no JSON", "a schema of a file",
          "a schema of itself", "a schema of nothing", "a pattern that is none"}  # fmt: skip


def test_the_schema_refuses_what_the_server_refuses(site: Site) -> None:
    schema = site.get("/openapi.json", Authorization=f"Bearer {KEY}").json
    checks = {
        path: jsonschema_rs.validator_for(
            {"$ref": f"#/components/schemas/{name}", "components": schema["components"]},
        )
        for path, name in ((CHAT, "ChatRequest"), (TEXT, "CompletionRequest"), ("/tokenize", "TokenizeRequest"),
                           ("/detokenize", "DetokenizeRequest"))
    }  # fmt: skip
    wrong, seen = [], {200: 0, 400: 0}
    for name, (path, body, status, _) in BODIES.items():
        if isinstance(body, bytes) or name in UNSAID:
            continue
        seen[min(status, 400)] += 1
        if checks[path].is_valid(json.loads(json.dumps(body))) != (status == 200):
            wrong.append(name)
    assert wrong == [] and seen[200] > 6 and seen[400] > 40
