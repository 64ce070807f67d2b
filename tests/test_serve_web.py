"""What stands around mlxgpt serve's endpoints: keys, foreign pages, limits, health, metrics, the log."""

import contextlib
import json
import re
import socket
from collections.abc import Iterator
from typing import Any

import pytest
from serve_fakes import FakeWorker, says
from serve_site import WAIT, Reply, Site, read, serving_site

from mlxgpt.common.errors import UserError
from mlxgpt.common.serve.web.app import Service
from mlxgpt.common.serve.web.settings import Settings
from mlxgpt.common.serve.work import Begun, Busy, Piece, Stopped

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
ASKED = {"prompt": "Hi", "max_tokens": 5, "seed": 3}
PAGE = "https://chat.example.com"


@pytest.fixture(scope="module")
def shared() -> Iterator[Site]:
    with serving_site(FakeWorker(), Settings(keys=("one-key", "schlüssel-二"), origins=(PAGE,))) as made:
        yield made


@pytest.fixture
def site(shared: Site) -> Site:
    """A site with keys, and an allowed page; its worker answers Hello."""
    worker = shared.worker
    assert isinstance(worker, FakeWorker)
    worker.script, worker.refusal, worker.death = says("Hello"), None, None
    worker.held.clear()
    worker.works, worker.cancelled = [], []
    shared.app.state.draining = False
    shared.rest()
    shared.lines.clear()
    return shared


def with_key(key: str = "one-key") -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def test_the_page_and_health_alone_are_open(site: Site) -> None:
    for path, kind in (("/", "text/html; charset=utf-8"), ("/health", "application/json")):
        reply = site.get(path)
        assert (reply.status, reply.headers["content-type"]) == (200, kind)
    for path in ("/metrics", "/openapi.json", "/v1/models", "/v1/models/tiny", "/nothing", "/health/", "//"):
        reply = site.get(path)
        assert (reply.status, reply.error["code"]) == (401, "invalid_api_key")
        assert reply.headers["www-authenticate"].startswith("Bearer")
    assert site.post("/health", {}).status == site.post("/", {}).status == site.post(TEXT, ASKED).status == 401
    for path in ("/metrics", "/openapi.json", "/v1/models", "/v1/models/tiny"):
        assert site.get(path, **with_key()).status == 200


@pytest.mark.parametrize("key", ("one-key", "schlüssel-二"))
def test_every_key_opens(site: Site, key: str) -> None:
    assert site.get("/v1/models", **with_key(key)).status == 200
    assert site.get("/v1/models", Authorization=f"bearer {key}").status == 200


@pytest.mark.parametrize(
    "given", ("Bearer ", "Bearer one-ke", "Bearer one-keyy", "Bearer one-key,schlüssel-二", "Basic one-key", "one-key")
)
def test_no_other_key_opens(site: Site, given: str) -> None:
    assert site.get("/v1/models", Authorization=given).status == 401


@pytest.mark.parametrize(
    ("host", "status"),
    (
        ("127.0.0.1:{port}", 200), ("localhost:{port}", 200), ("LOCALHOST:{port}", 200), ("localhost.:{port}", 200),
        ("[::1]:{port}", 200), ("chat.example.com", 200), ("chat.example.com:443", 200),
        ("localhost", 403), ("localhost:1", 403), ("127.0.0.1", 403), ("evil.example:{port}", 403), ("", 403),
        ("localhost.evil.example:{port}", 403), ("127.0.0.1.nip.io:{port}", 403), ("evil@localhost:{port}", 403),
        ("localhost:{port}:80", 403), ("chat.example.com:{port}", 403), ("192.168.0.1:{port}", 403),
        ("0.0.0.0:{port}", 403),        ("[::1", 403), ("localhost :{port}", 403), ("127.1:{port}", 403),
    ),
)  # fmt: skip
def test_a_foreign_host_is_refused(site: Site, host: str, status: int) -> None:
    reply = site.get("/health", Host=host.format(port=site.port))
    assert reply.status == status
    assert status == 200 or (reply.error["code"], reply.error["type"]) == ("host_not_allowed", "permission_error")


@pytest.mark.parametrize("every", ("0.0.0.0", "::"))
def test_every_address_of_the_machine_is_ours_if_all_are_served(every: str) -> None:
    with serving_site(FakeWorker(), Settings(host=every)) as site:
        for host in ("127.0.0.1", "localhost", socket.gethostname()):
            assert site.get("/health", Host=f"{host}:{site.port}").status == 200
        for host in ("evil.example", "0.0.0.0", "10.255.255.1"):
            assert site.get("/health", Host=f"{host}:{site.port}").status == 403


@pytest.mark.parametrize(
    ("headers", "status"),
    (
        ({}, 200),
        ({"Origin": "http://127.0.0.1:{port}"}, 200), ({"Origin": PAGE}, 200), ({"Origin": PAGE.upper()}, 200),
        ({"Origin": "http://localhost:{port}"}, 403),  # a page of another name than the one that was asked
        ({"Origin": "https://127.0.0.1:{port}"}, 403), ({"Origin": "http://127.0.0.1"}, 403), ({"Origin": "null"}, 403),
        ({"Origin": "http://chat.example.com"}, 403), ({"Origin": f"{PAGE}.evil.example"}, 403), ({"Origin": ""}, 403),
        ({"Origin": f"{PAGE}:8443"}, 403), ({"Origin": "https://evil.example"}, 403),
        ({"Sec-Fetch-Site": "same-origin"}, 200), ({"Sec-Fetch-Site": "none"}, 200),
        ({"Sec-Fetch-Site": "cross-site"}, 403), ({"Sec-Fetch-Site": "same-site"}, 403),
        ({"Sec-Fetch-Site": "cross-site", "Origin": PAGE}, 200),
        ({"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}, 403),
    ),
)  # fmt: skip
def test_a_foreign_page_is_refused(site: Site, headers: dict[str, str], status: int) -> None:
    headers = {name: value.format(port=site.port) for name, value in headers.items()}
    for reply in (site.ask("GET", "/health", None, headers), site.post(TEXT, ASKED, **with_key(), **headers)):
        assert reply.status == status
        assert status == 200 or reply.error["code"] == "origin_not_allowed"
    assert len(site.worker.works) == (status == 200)  # pyright: ignore[reportAttributeAccessIssue]


def test_a_link_elsewhere_opens_the_page(site: Site) -> None:
    followed = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}
    assert site.ask("GET", "/", None, followed).status == 200
    assert site.ask("GET", "/", None, followed | {"Sec-Fetch-Mode": "no-cors"}).status == 403


def test_an_allowed_page_may_ask_and_read(site: Site) -> None:
    asks = {
        "Origin": PAGE,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,x-a",
    }
    reply = site.ask("OPTIONS", TEXT, None, asks)
    assert (reply.status, reply.body) == (204, b"")
    assert reply.headers["access-control-allow-origin"] == PAGE
    assert reply.headers["access-control-allow-headers"] == "authorization,x-a"
    assert "POST" in reply.headers["access-control-allow-methods"]
    for reply, status in (
        (site.post(TEXT, ASKED, **with_key(), Origin=PAGE), 200),
        (site.get("/v1/models", Origin=PAGE), 401),
    ):
        assert (reply.status, reply.headers["access-control-allow-origin"]) == (status, PAGE)
        assert "X-Seed" in reply.headers["access-control-expose-headers"] and reply.headers["vary"] == "Origin"
    assert "access-control-allow-origin" not in site.get("/health").headers
    foreign = site.ask("OPTIONS", TEXT, None, asks | {"Origin": "https://evil.example"})
    assert foreign.status == 403 and "access-control-allow-origin" not in foreign.headers
    for more in ({}, {"Access-Control-Request-Method": "POST"}):  # of no page
        assert site.ask("OPTIONS", TEXT, None, with_key() | more).status == 405


def test_nothing_lets_pages_read_unless_it_is_given() -> None:
    with serving_site(FakeWorker()) as site:
        own = site.get("/health", Origin=f"http://127.0.0.1:{site.port}")
        assert own.status == 200 and not any(name.startswith("access-control") for name in own.headers)
    with serving_site(FakeWorker(), Settings(origins=("*",))) as site:
        reply = site.post(TEXT, ASKED, Origin="https://anyone.example")
        assert (reply.status, reply.headers["access-control-allow-origin"]) == (200, "*")
        assert site.get("/health", Host="evil.example").status == 403


@pytest.mark.parametrize("origin", ("chat.example.com", "https://", "https://a/b", "https://a b", ""))
def test_an_origin_that_no_page_has_is_refused_at_the_start(origin: str) -> None:
    with pytest.raises(UserError, match="--allow-origin .*expected scheme and host"):
        Settings(origins=(origin,))


@pytest.mark.parametrize(
    ("kind", "status"),
    (
        ("application/json", 200), ("application/json; charset=utf-8", 200),
        ('Application/JSON;Charset="UTF-8"', 200),
        ("text/plain", 415), ("application/x-www-form-urlencoded", 415), ("multipart/form-data; boundary=x", 415),
        ("text/plain; application/json", 415), ("application/json, text/plain", 415), ("application/jsonp", 415),
        ("application/json; charset=latin-1", 415), ("", 415),
    ),
)  # fmt: skip
def test_json_alone_is_read(site: Site, kind: str, status: int) -> None:
    reply = site.post(TEXT, ASKED, **with_key(), Content_Type=kind)
    assert reply.status == status
    assert status == 200 or reply.error["code"] == "unsupported_media_type"


def test_what_is_not_there_is_said_in_the_shape_of_the_api(site: Site) -> None:
    reply = site.get("/v1/embeddings", **with_key())
    assert (reply.status, reply.error["code"]) == (404, "not_found")
    assert "base URL ends in /v1" in site.post("/chat/completions", ASKED, **with_key()).error["message"]
    reply = site.ask("DELETE", "/v1/models", None, with_key())
    assert (reply.status, reply.error["code"]) == (405, "method_not_allowed")
    assert set(reply.headers["allow"].split(", ")) == {"GET", "HEAD"}
    reply = site.ask("HEAD", "/health")
    assert (reply.status, reply.body) == (200, b"")


def test_answers_say_nothing_of_the_server_and_are_kept_by_nobody(site: Site) -> None:
    for reply in (site.get("/health"), site.get("/nothing"), site.post(TEXT, ASKED, **with_key())):
        headers = reply.headers
        assert "server" not in headers and headers["cache-control"] == "no-store"
        assert headers["x-content-type-options"] == "nosniff" and headers["referrer-policy"] == "no-referrer"
        assert "frame-ancestors 'none'" in headers["content-security-policy"]
    page = site.get("/").headers
    assert "script-src 'sha256-" in page["content-security-policy"]
    assert "frame-ancestors 'none'" in page["content-security-policy"] and "server" not in page


def test_a_dead_engine_and_an_ending_server_answer_503(site: Site) -> None:
    for state, code in (("dead", "engine_dead"), ("draining", "draining")):
        if state == "dead":
            site.worker.death = MemoryError("gone")  # pyright: ignore[reportAttributeAccessIssue]
        else:
            site.worker.death = None  # pyright: ignore[reportAttributeAccessIssue]
            site.app.state.draining = True
        asked = [site.post(path, ASKED, **with_key()) for path in (CHAT, TEXT, "/tokenize", "/detokenize")]
        for reply in (site.get("/health"), *asked):
            assert (reply.status, reply.error["code"], reply.error["type"]) == (503, code, "server_error")
            assert int(reply.headers["retry-after"]) > 0
        up = site.get("/metrics", **with_key()).body
        assert (b"\nmlxgpt_up 0\n" if state == "dead" else b"\nmlxgpt_up 1\n") in up


def test_a_full_queue_says_when_to_come_again(site: Site) -> None:
    site.worker.refusal = Busy(17)  # pyright: ignore[reportAttributeAccessIssue]
    reply = site.post(TEXT, ASKED, **with_key())
    assert (reply.status, reply.headers["retry-after"], reply.error["type"]) == (429, "17", "rate_limit_error")
    site.worker.refusal = Stopped("the server is ending")  # pyright: ignore[reportAttributeAccessIssue]
    reply = site.post(TEXT, ASKED | {"stream": True}, **with_key())
    assert reply.status == 503 and int(reply.headers["retry-after"]) > 0


def test_each_request_is_a_line_without_its_secrets(site: Site) -> None:
    site.post(TEXT + "?key=secret-query", ASKED | {"prompt": "secret-prompt"}, **with_key())
    wrong = site.post(TEXT, ASKED | {"prompt": {"secret-part": 1}}, **with_key())
    assert "found {'secret-part': 1}" in wrong.error["message"]
    site.get("/%0a%1b[2Jx", **with_key())
    site.get("/v1/models?x=1", **with_key("secret-key"))
    one, bad, two, three = site.take_lines(4)
    assert " POST /v1/completions 400 " in bad and ": prompt: " in bad
    assert re.fullmatch(r"127\.0\.0\.1 POST /v1/completions 200 \d+ ms 13\+5 tokens req_[0-9a-f]{16}", one)
    assert " GET /\\n\\x1b[2Jx 404 " in two and two.isprintable()
    assert " GET /v1/models 401 " in three
    assert not re.search("secret|Hello", one + bad + two + three)


def test_a_fault_of_ours_is_one_line_and_json(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(self: object) -> None:
        raise TypeError("two\nlines")

    monkeypatch.setattr(Service, "models", breaks)
    reply = site.get("/v1/models", **with_key(), Origin=PAGE)
    assert (reply.status, reply.error["type"]) == (500, "server_error") and b"lines" not in reply.body
    assert reply.headers["access-control-allow-origin"] == PAGE
    (line,) = site.take_lines(1)
    assert r": TypeError: two\nlines (test_serve_web.py line " in line


def parsed(text: str) -> dict[str, tuple[str, dict[str, float]]]:
    """Prometheus' text format 0.0.4: name -> kind, and the value of each sample."""
    found: dict[str, tuple[str, dict[str, float]]] = {}
    lines, kind, name = text.split("\n"), "", ""
    assert lines.pop() == ""
    for line in lines:
        if line.startswith("# HELP "):
            name = line.split(" ")[2]
            assert name not in found and line.endswith(".")
        elif line.startswith("# TYPE "):
            _, _, same, kind = line.split(" ")
            assert same == name and kind in ("counter", "gauge", "summary")
            found[name] = kind, {}
        else:
            match = re.fullmatch(
                r'([a-z_]+)(\{[a-z]+="(?:[^"\\\n]|\\[\\"n])*"(?:,[a-z]+="(?:[^"\\\n]|\\[\\"n])*")*\})? (\S+)', line
            )
            assert match and match[1].removesuffix("_sum").removesuffix("_count") == name, line
            assert match[1] == name or kind == "summary"
            found[name][1][match[1].removeprefix(name) + (match[2] or "")] = float(match[3])
    return found


def test_metrics_are_what_the_engine_counts(site: Site) -> None:
    counts = site.worker.counts
    names = {
        "requests_running": "running", "requests_waiting": "waiting", "requests_total": "requests",
        "choices_finished_total": "finished", "choices_cancelled_total": "cancelled", "choices_failed_total": "failed",
        "prompt_tokens_total": "prompt_tokens", "generated_tokens_total": "generated_tokens",
        "prefix_cache_tokens_total": "cached_tokens", "prefix_cache_hits_total": "cache_hits",
        "prefix_cache_misses_total": "cache_misses", "prefix_cache_bytes": "cache_bytes", "steps_total": "steps",
    }  # fmt: skip
    for value, field in enumerate(names.values(), 5):
        setattr(counts, field, value)
    counts.first_token_seconds = [n / 100 for n in range(100, 0, -1)]
    counts.first_token_total, counts.first_token_count = 50.5, 200
    reply = site.get("/metrics", **with_key())
    assert reply.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    found = parsed(reply.body.decode())
    for value, name in enumerate(names, 5):
        kind, samples = found[f"mlxgpt_{name}"]
        assert samples == {"": value} and kind == ("counter" if name.endswith("_total") else "gauge")
    assert found["mlxgpt_time_to_first_token_seconds"] == (
        "summary",
        {'{quantile="0.5"}': 0.5, '{quantile="0.9"}': 0.9, '{quantile="0.99"}': 0.99, "_sum": 50.5, "_count": 200},
    )
    assert found["mlxgpt_resident_memory_peak_bytes"][1][""] > 1e7
    (model,) = found["mlxgpt_model_info"][1]
    assert 'model="tiny"' in model and f'digest="{"ab" * 32}"' in model
    before = found["mlxgpt_http_responses_total"][1]
    site.get("/nothing", **with_key())
    site.take_lines(2)
    after = parsed(site.get("/metrics", **with_key()).body.decode())["mlxgpt_http_responses_total"][1]
    assert after['{status="404"}'] == before.get('{status="404"}', 0) + 1


def test_a_connection_is_kept_for_the_next_request(site: Site) -> None:
    with site.connect() as client:
        for _ in range(3):
            client.sendall(
                site.request("POST", TEXT, json.dumps(ASKED).encode(), with_key() | {"Connection": "keep-alive"})
            )
            got = b""
            while not (got and Reply(got).whole):
                got += client.recv(1 << 16)
            assert Reply(got).status == 200


@pytest.mark.parametrize("streams", (False, True))
def test_a_client_that_leaves_is_cancelled_while_it_waits(site: Site, streams: bool) -> None:
    worker = site.worker
    assert isinstance(worker, FakeWorker)
    worker.held.set()
    with site.connect() as client:
        client.sendall(site.request("POST", TEXT, json.dumps(ASKED | {"stream": streams}).encode(), with_key()))
        site.until(lambda: worker.works)
        assert not worker.cancelled
    site.until(lambda: worker.cancelled)
    assert worker.cancelled == worker.works
    (line,) = site.take_lines(1)
    assert line.endswith(": the client left") and (" 200 " if streams else " 499 ") in line


def test_a_stream_that_breaks_off_does_not_look_whole(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    async def breaks(self: Service, *_: Any) -> Any:
        yield b"data: 1\n\n"
        raise ZeroDivisionError("x")

    monkeypatch.setattr(Service, "_events", breaks)
    reply = site.post(TEXT, ASKED | {"stream": True}, **with_key())
    assert (reply.status, reply.whole, reply.body) == (200, False, b"data: 1\n\n")
    assert "ZeroDivisionError" in site.take_lines(1)[0]


def test_events_come_one_by_one_and_comments_in_silence() -> None:
    worker = FakeWorker()
    worker.held.set()
    with serving_site(worker, Settings(keep_alive_seconds=0.05)) as site, site.connect() as client:
        client.sendall(site.request("POST", TEXT, json.dumps(ASKED | {"stream": True}).encode()))
        got = b""
        while got.count(b": keep-alive\n\n") < 2:
            got += client.recv(1 << 16)
        assert Reply(got).headers["content-type"].startswith("text/event-stream")
        (work,) = worker.works
        work.say(Begun(0))
        work.say(Piece(0, "abc"))
        while b'"abc"' not in got:
            got += client.recv(1 << 16)
        assert b"[DONE]" not in got
        work.say(Piece(0, "", (), "eos"))
        assert Reply(got + read(client)).body.endswith(b"data: [DONE]\n\n")


SHORT = Settings(header_seconds=0.2, body_seconds=0.2, stalled_seconds=0.2, idle_seconds=1, max_connections=2)


@pytest.fixture(scope="module")
def short() -> Iterator[Site]:
    """A site with little patience, and for two connections."""
    with serving_site(FakeWorker(), SHORT) as made:
        yield made


def test_headers_that_trickle_are_given_up(short: Site) -> None:
    short.rest()
    short.lines.clear()
    with short.connect() as client:
        for byte in f"GET /health HTTP/1.1\r\nX: {'x' * 60}".encode():
            client.sendall(bytes([byte]))
            client.settimeout(0.02)
            with contextlib.suppress(TimeoutError):
                client.recv(1, socket.MSG_PEEK)
                break
        else:
            pytest.fail("each byte got a time of its own")
        client.settimeout(WAIT)
        reply = Reply(read(client))
    assert (reply.status, reply.error["code"]) == (408, "request_timeout")
    assert " 408 " in short.take_lines(1)[0]


def test_a_second_request_that_trickles_is_given_up(short: Site) -> None:
    with short.connect() as client:
        client.sendall(f"GET /health HTTP/1.1\r\nHost: localhost:{short.port}\r\n\r\nGET /hea".encode())
        one = Reply(read(client))
    assert (one.status, Reply(one.rest).status) == (200, 408)


def test_a_body_that_trickles_is_given_up(short: Site) -> None:
    with short.connect() as client:
        client.sendall(
            short.request("POST", TEXT, None, {"Content-Type": "application/json", "Content-Length": "50"}) + b"{"
        )
        reply = Reply(read(client))
    assert (reply.status, reply.error["code"], reply.headers["connection"]) == (408, "request_timeout", "close")


def test_a_connection_without_a_request_is_closed_without_a_word(short: Site) -> None:
    short.rest()
    short.lines.clear()
    with short.connect() as client:
        assert read(client) == b""
    assert short.lines == []


def test_an_answer_that_nobody_reads_is_given_up(short: Site) -> None:
    worker = short.worker
    assert isinstance(worker, FakeWorker)
    worker.held.set()
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", short.port))
        client.sendall(short.request("POST", TEXT, json.dumps(ASKED | {"stream": True}).encode()))
        short.until(lambda: worker.works)
        for _ in range(64):
            worker.works[0].say(Piece(0, "x" * 200_000))
        short.until(lambda: worker.cancelled)
    worker.held.clear()


def test_connections_past_the_limit_are_told_so(short: Site) -> None:
    with short.connect() as one, short.connect() as two:
        for client in (one, two):
            client.sendall(short.request("GET", "/health", None, {"Connection": "keep-alive"}))
            assert Reply(client.recv(1 << 16)).status == 200
        reply = short.get("/health")
        assert (reply.status, reply.error["code"]) == (503, "too_many_connections")
        assert int(reply.headers["retry-after"]) > 0
    short.until(lambda: not short.server.server_state.connections)
    assert short.get("/health").status == 200
