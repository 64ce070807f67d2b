"""Servers in processes of their own: ours and its peers, started on a free port and ended."""

import atexit
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

MLX_LM = """
from mlxgpt import blas  # the same BLAS, before MLX
import mlx.core as mx
mx.set_default_device(mx.Device(mx.cpu))
from mlx_lm.server import main
main()
"""
TRANSFORMERS = "import sys; sys.argv[0] = 'transformers'; from transformers.cli.transformers import main; main()"


def free_port() -> int:
    """A port that nobody listens to."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@dataclass
class Server:
    """One process; ``words`` has {port} and {model} where these belong."""

    name: str
    words: tuple[str, ...]
    model: str  # the folder
    asked: str = ""  # what requests call the model
    extra: dict[str, Any] = field(default_factory=dict)  # is added to each body
    python: str = sys.executable
    env: dict[str, str] = field(default_factory=dict)
    ready: float = 0.0  # seconds from the start to the first answer

    def start(self, first: dict[str, Any], limit: float = 300.0) -> "Server":
        """Starts it, and waits until it answers ``first``."""
        self.port = free_port()
        words = [word.format(port=self.port, model=self.model) for word in self.words]
        self.log = tempfile.NamedTemporaryFile("w+", prefix="server-", suffix=".log")  # noqa: SIM115  (until stop)
        began = time.perf_counter()
        self.process = subprocess.Popen(
            [self.python, *words], stdout=self.log, stderr=subprocess.STDOUT, env={**os.environ, **self.env}
        )
        atexit.register(self.process.kill)  # where the benchmark fails before stop
        while time.perf_counter() - began < limit:
            if self.process.poll() is not None:
                raise SystemExit(f"{self.name}: exit code {self.process.returncode}: {self.said()[-800:]}")
            try:
                self.ask("/v1/chat/completions", self.body(**first))
            except HTTPError as error:
                raise SystemExit(f"{self.name}: {error.code}: {error.read().decode()[:500]}") from None
            except OSError:
                time.sleep(0.02)
            else:
                self.ready = time.perf_counter() - began
                return self
        raise SystemExit(f"{self.name}: no answer in {limit:g} s: {self.said()[-800:]}")

    def said(self) -> str:
        """What it wrote."""
        return Path(self.log.name).read_text()

    def body(self, **fields: Any) -> dict[str, Any]:
        """A request of this server's model."""
        return {"model": self.asked, **self.extra, **fields} if self.asked else {**self.extra, **fields}

    def ask(self, path: str, body: dict[str, Any] | None = None, timeout: float = 60.0) -> bytes:
        """A request that is no stream."""
        data = None if body is None else json.dumps(body).encode()
        asked = Request(f"http://127.0.0.1:{self.port}{path}", data, {"Content-Type": "application/json"})
        with urlopen(asked, timeout=timeout) as answer:
            return answer.read()

    def resident(self, what: str = "VmRSS") -> float:
        """MiB that the process has now (``VmHWM``: had at most); 0 where the system does not say."""
        try:
            status = Path(f"/proc/{self.process.pid}/status").read_text()
        except OSError:
            return 0.0
        found = re.search(rf"{what}:\s+(\d+) kB", status)
        return int(found[1]) / 1024 if found else 0.0

    def stop(self, limit: float = 60.0) -> int:
        """SIGTERM, and the exit code; -9 where it had to be killed."""
        self.process.send_signal(signal.SIGTERM)
        try:
            code = self.process.wait(limit)
        except subprocess.TimeoutExpired:
            self.process.kill()
            code = self.process.wait()
        self.log.close()
        return code


def ours(model: str, backend: str = "mlx", *words: str) -> Server:
    """`mlxgpt serve`."""
    given = ("-m", "mlxgpt", "serve", "-m", "{model}", "--port", "{port}", "--backend", backend, *words)
    return Server(f"mlxgpt serve, {backend}", given, model, asked=Path(model).name)


def mlx_lm(model: str) -> Server:
    """mlx_lm.server with the BLAS that we get; a random model's answers are as long as asked only by chance."""
    words = ("-c", MLX_LM, "--model", "{model}", "--port", "{port}", "--log-level", "ERROR")
    return Server("mlx_lm.server", words, model)


def transformers(model: str, python: str = sys.executable, *words: str) -> Server:
    """transformers serve, told to sample (by itself it is greedy); its fastapi may lie in another environment."""
    given = ("serve", "{model}", "--port", "{port}", "--host", "127.0.0.1", "--device", "cpu", *words)
    extra = {"generation_config": json.dumps({"do_sample": True, "pad_token_id": 0})}
    return Server("transformers serve", ("-c", TRANSFORMERS, *given), model, model, extra, python)
