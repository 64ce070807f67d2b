"""The verb ``serve``: answers requests of OpenAI's API, and shows a page to chat on."""

import argparse
import importlib.util
import ipaddress
import stat
import sys
from pathlib import Path

from mlxgpt.common import backend as backends
from mlxgpt.common import recipes, units
from mlxgpt.common.errors import UserError
from mlxgpt.common.plan import gate

NEEDS = ("starlette", "uvicorn", "pydantic", "llguidance")
LEAST_KEY = 8  # characters
SHARE, MOST = 0.25, 4 * 2**30  # of the memory that is free, and bytes at the most, for what requests begin with


def serve_command(args: argparse.Namespace) -> int:
    """Serves until a signal comes.

    Args:
        args: of arguments.inference.serve.

    Returns:
        0 after SIGTERM, 130 after Ctrl-C.

    Raises:
        UserError: before anything is loaded: see the messages.
        RunError: the engine died.
    """
    if missing := [name for name in NEEDS if importlib.util.find_spec(name) is None]:
        raise UserError(f"serve: {', '.join(missing)} is not installed: pip install 'mlxgpt[serve]'")
    from mlxgpt.common.serve import models
    from mlxgpt.common.serve.engine import Engine
    from mlxgpt.common.serve.guided.guide import Guide
    from mlxgpt.common.serve.web import life
    from mlxgpt.common.serve.web.settings import Settings

    options = models.Options(
        args.model,
        args.name or "",
        args.adapter,
        args.device,
        args.force,
        args.template or "",
        recipes.parse_table(args.template_kwargs or "{}", "--template-kwargs"),
        args.stop_token,
        args.kv_bits,
    )
    keys = _keys(args.api_key_file)
    if not keys and not _is_loopback(args.host):
        raise UserError(
            f"--host {args.host}: other machines could reach it without a key: expected --api-key-file FILE, or "
            "--host 127.0.0.1"
        )
    given = args.cache_bytes
    held = 0 if given in (None, "0") else units.read_size(given, "--cache-bytes")
    body = units.read_size(args.max_body, "--max-body")
    listed = models.check(options)
    with life.bind(args.host, args.port) as sock:
        port = sock.getsockname()[1]
        prompts = max(1, min(Settings.max_prompts, args.max_queue))
        connections = max(Settings.max_connections, 2 * (args.max_batch + args.max_queue))
        settings = Settings(
            args.host,
            port,
            keys,
            tuple(args.allow_origin),
            body,
            max_prompts=prompts,
            max_connections=connections,
            backend=args.backend,
        )
        backend = backends.load(args.backend)
        free = gate.room(backend, backend.engine.devices.find(args.device))["limit"] - models.weight_bytes(options)
        held = max(0, min(MOST, int(SHARE * free))) if given is None else held
        load, bits = (lambda: models.load_all(backend, options)), args.kv_bits
        engine = Engine(backend, load, args.max_batch, args.max_queue, held, bits)
        try:
            engine.start()
            for each in engine.served.values():
                Guide(each).ready()
        except (KeyboardInterrupt, SystemExit) as told:
            life.leave(engine, told.code if isinstance(told, SystemExit) else 130)  # type: ignore[arg-type]
            raise

        def ready() -> None:
            served = list(engine.served.values())
            _say(f"http://{_shown(args.host)}:{port} serves OpenAI's API at /v1, and a page to chat on")
            for each, (_, adapters) in zip(served, listed, strict=True):
                what = "an adapter" if adapters else "the model"
                chats = "" if each.template else "; no chat template: completions only"
                _say(f"  {each.name}: {what}, {each.context:,} tokens of context{chats}")
            most = models.cache_bytes(served, args.max_batch, args.kv_bits)
            _say(f"  memory for {args.max_batch} answers at once: at most {units.size(most)}")
            _say(f"  memory for the prompts of earlier requests: at most {units.size(held)}")
            if most + held > free:
                _say(f"  only {units.size(max(0, free))} are free: --max-batch and --cache-bytes lower it")

        return life.run(engine, settings, sock, args.grace, ready)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _shown(host: str) -> str:
    """A host as an address has it; one that can be opened here."""
    if host in ("0.0.0.0", "::"):
        return "127.0.0.1" if host == "0.0.0.0" else "[::1]"
    return f"[{host}]" if ":" in host else host


def _is_loopback(host: str) -> bool:
    """Whether this machine alone can reach it."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _keys(name: str | None) -> tuple[str, ...]:
    """The keys of a file, a line each; empty lines and lines that begin with # are left out.

    Raises:
        UserError: it cannot be read, or holds no key that is long enough.
    """
    if name is None:
        return ()
    path = Path(name).expanduser()
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
        mode = path.stat().st_mode
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--api-key-file {name}: {getattr(error, 'strerror', None) or error}") from None
    keys = tuple(line for line in lines if line and not line.startswith("#"))
    if not keys or min(map(len, keys)) < LEAST_KEY:
        found = f"a key of {min(map(len, keys))} characters" if keys else "no key"
        raise UserError(f"--api-key-file {name}: {found}: expected a key a line, of {LEAST_KEY} characters or more")
    if mode & (stat.S_IRGRP | stat.S_IROTH):
        print(f"mlxgpt: warning: --api-key-file {name}: others can read it; chmod 600 {name}", file=sys.stderr)
    return keys
