"""The app: every route, and who answers it."""

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from mlxgpt.common.serve.api.errors import ApiError
from mlxgpt.common.serve.web import metrics
from mlxgpt.common.serve.web.door import Door
from mlxgpt.common.serve.web.log import Log
from mlxgpt.common.serve.web.requests import read_json
from mlxgpt.common.serve.web.security import Guard
from mlxgpt.common.serve.web.settings import Settings
from mlxgpt.common.serve.work import Worker


def make_app(worker: Worker, settings: Settings, log: Log | None = None) -> Starlette:
    """The app; set ``app.state.draining`` when the server is told to end."""
    log = log or Log()

    async def health(request: Request) -> Response:
        if worker.death is not None:
            raise _dead()
        if app.state.draining:
            raise ApiError(503, "the server is ending", code="draining", headers={"Retry-After": _retry(settings)})
        return JSONResponse({"status": "ok"})

    async def show_metrics(request: Request) -> Response:
        text = metrics.text(worker, settings.backend, log.statuses)
        return PlainTextResponse(text, headers={"Content-Type": metrics.CONTENT_TYPE})

    async def todo(request: Request) -> Response:
        if worker.death is not None:
            raise _dead()
        await read_json(request, settings)
        raise ApiError(503, "not yet")

    app = Starlette(
        routes=[
            Route("/health", health),
            Route("/metrics", show_metrics),
            Route("/v1/chat/completions", todo, methods=["POST"]),
            Route("/v1/completions", todo, methods=["POST"]),
            Route("/tokenize", todo, methods=["POST"]),
            Route("/detokenize", todo, methods=["POST"]),
        ],
        middleware=[Middleware(Door, Guard(settings), log)],
        exception_handlers={HTTPException: _no_route},
    )
    app.router.redirect_slashes = False
    app.state.draining = False
    return app


async def _no_route(request: Request, error: Exception) -> Response:
    """404 and 405 in OpenAI's shape."""
    assert isinstance(error, HTTPException)
    if error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "")
        wrong = ApiError(
            405, f"{request.method} is not for this path: expected {allowed}", code="method_not_allowed",
            headers={"Allow": allowed},
        )  # fmt: skip
    else:
        wrong = ApiError(404, "there is nothing at this path; /openapi.json lists what there is", code="not_found")
    raise wrong


def _dead() -> ApiError:
    return ApiError(503, "the engine died; the server's log says why", code="engine_dead")


def _retry(settings: Settings) -> str:
    return str(settings.retry_seconds)
