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
from mlxgpt.common.plan import machine

NEEDS = ("starlette", "uvicorn", "pydantic", "llguidance")
LEAST_KEY = 8  # characters
SHARE, MOST = 0.25, 4 * 2**30  # of the memory that is free, and bytes at the most, for what requests begin with


def serve_command(args: argparse.Namespace) -> int:
    """Serves until a signal comes.

    Args:
        args: of arguments.serve.

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
    )
    keys = _keys(args.api_key_file)
    if not keys and not _is_loopback(args.host):
        raise UserError(
            f"--host {args.host}: other machines could reach it without a key: expected --api-key-file FILE, or "
            "--host 127.0.0.1"
        )
    held = 0 if args.cache_bytes == "0" else _default_cache()
    if args.cache_bytes not in (None, "0"):
        held = units.read_size(args.cache_bytes, "--cache-bytes")
    body = units.read_size(args.max_body, "--max-body")
    models.names_of(options)
    with life.bind(args.host, args.port) as sock:
        port = sock.getsockname()[1]
        connections = max(Settings.max_connections, 2 * (args.max_batch + args.max_queue))
        settings = Settings(
            args.host, port, keys, tuple(args.allow_origin), body, max_connections=connections, backend=args.backend
        )
        backend = backends.load(args.backend)
        engine = Engine(backend, lambda: models.load_all(backend, options), args.max_batch, args.max_queue, held)
        engine.start()
        served = list(engine.served.values())
        print(f"http://{_shown(args.host)}:{port} serves OpenAI's API at /v1, and a page to chat on", file=sys.stderr)
        for each in served:
            chats = "" if each.template else ", no chat template: completions only"
            print(f"  {each.name}: a context of {each.context:,} tokens{chats}", file=sys.stderr)
        most = units.size(models.cache_bytes(served, args.max_batch))
        print(f"  {args.max_batch} answers at once take at most {most} for keys and values,", file=sys.stderr)
        print(f"  what earlier requests held {units.size(held)}; Ctrl-C ends", file=sys.stderr)
        return life.run(engine, settings, sock, args.grace)


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


def _default_cache() -> int:
    return min(MOST, int(SHARE * machine.free()))
