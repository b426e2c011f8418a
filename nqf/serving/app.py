"""The service over HTTP: JSON endpoints, OpenAPI, a page to click through, metrics; Starlette and nothing above it.

Answers hold neither paths nor tracebacks. Bodies have to say that they are JSON, so that no page of another site can
send one in the name of who looks at it.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import hmac
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from nqf import __version__
from nqf.serving.requests import Change, Explain, Lookup, Recommend, Remove, Search, Similar
from nqf.serving.service import Busy, Service

LARGEST_BODY = 4 << 20
"""Bytes of a request's body at most."""
TIMEOUT = 60.0
"""Seconds until a request is given up."""
_WEB = Path(__file__).parent / "web"
_POLICY = (
    "default-src 'none'; img-src 'self' blob:; script-src 'self'; style-src 'self'; connect-src 'self'; base-uri 'none'"
)
_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)
_log = logging.getLogger("nqf.serve")

Answer = Callable[[Request], Awaitable[Response]]
# Path, method, name of the service's method, body, and whether the run is changed by it.
_ENDPOINTS: tuple[tuple[str, str, str, type[BaseModel], bool], ...] = (
    ("/v1/recommend", "POST", "recommend", Recommend, False),
    ("/v1/similar", "POST", "similar", Similar, False),
    ("/v1/explain", "POST", "explain", Explain, False),
    ("/v1/search", "POST", "search", Search, False),
    ("/v1/lookup", "POST", "lookup", Lookup, False),
    ("/v1/items", "POST", "add", Change, True),
    ("/v1/items", "PATCH", "update", Change, True),
    ("/v1/items", "DELETE", "remove", Remove, True),
)


class Refused(Exception):
    """A request that is answered by an error."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Metrics:
    """Counts and times of answers, in the text format of Prometheus."""

    def __init__(self) -> None:
        self.answers: collections.Counter[tuple[str, int]] = collections.Counter()
        self.slower: collections.Counter[tuple[str, float]] = collections.Counter()
        self.seconds: dict[str, float] = collections.defaultdict(float)

    def note(self, route: str, status: int, seconds: float) -> None:
        """Counts one answer."""
        self.answers[route, status] += 1
        self.seconds[route] += seconds
        for bucket in _BUCKETS:
            self.slower[route, bucket] += seconds <= bucket

    def text(self, service: Service) -> str:
        """All of them."""
        lines = ["# TYPE nqf_requests_total counter"]
        lines += [
            f'nqf_requests_total{{route="{route}",status="{status}"}} {count}'
            for (route, status), count in sorted(self.answers.items())
        ]
        lines.append("# TYPE nqf_request_seconds histogram")
        for route in sorted(self.seconds):
            count = sum(count for (other, _), count in self.answers.items() if other == route)
            lines += [
                f'nqf_request_seconds_bucket{{route="{route}",le="{bucket}"}} {self.slower[route, bucket]}'
                for bucket in _BUCKETS
            ]
            lines.append(f'nqf_request_seconds_bucket{{route="{route}",le="+Inf"}} {count}')
            lines.append(f'nqf_request_seconds_sum{{route="{route}"}} {self.seconds[route]:.6f}')
            lines.append(f'nqf_request_seconds_count{{route="{route}"}} {count}')
        lines.append("# TYPE nqf_batches_total counter")
        lines += [f'nqf_batches_total{{requests="{size}"}} {count}' for size, count in sorted(service.batches.items())]
        lines += ["# TYPE nqf_items gauge", f"nqf_items {int(service.recommender.available.sum())}"]
        lines += ["# TYPE nqf_reload_failed gauge", f"nqf_reload_failed {int(service.failed)}"]
        return "\n".join(lines) + "\n"


class _Site:
    """The endpoints of a service; see `make_app`."""

    def __init__(self, service: Service, token: str) -> None:
        self.service, self.token, self.metrics = service, token, Metrics()

    def route(self, path: str, method: str, answer: Answer, *, secret: bool = True) -> Route:
        """An endpoint that counts its answers and turns errors into some that say what the asker can do."""

        async def endpoint(request: Request) -> Response:
            begun = time.perf_counter()
            try:
                if secret and self.token:
                    given = request.headers.get("authorization", "").removeprefix("Bearer ")
                    if not hmac.compare_digest(given.encode(), self.token.encode()):
                        raise Refused(401, "a token is needed: send the header 'Authorization: Bearer TOKEN'")
                response = await asyncio.wait_for(answer(request), TIMEOUT)
            except Exception as error:
                response = _refusal(error, self.service)
            self.metrics.note(f"{method} {path}", response.status_code, time.perf_counter() - begun)
            response.headers["x-content-type-options"] = "nosniff"
            return response

        return Route(path, endpoint, methods=[method])

    def posted(self, name: str, body: type[BaseModel], changes: bool) -> Answer:
        """What a method of the service answers to a body."""

        async def answer(request: Request) -> Response:
            if changes and not self.service.writable:
                raise Refused(403, "this service changes no items; it was started with --read-only")
            return JSONResponse(await getattr(self.service, name)(await _body(request, body)))

        return answer

    async def health(self, request: Request) -> Response:
        service, recommender = self.service, self.service.recommender
        return JSONResponse(
            {
                "status": "ok",
                "stage": service.stage,
                "items": int(recommender.available.sum()),
                "users": len(recommender.user_ids),
                "reload_failed": service.failed,
                "search": recommender.search,
                "nqf": __version__,
            }
        )

    async def picture(self, request: Request) -> Response:
        content = await self.service.picture(request.query_params.get("item_id", ""))
        if content is None:
            raise Refused(404, "this item has no picture that can be read")
        return Response(content, media_type="image/jpeg", headers={"cache-control": "max-age=3600"})

    async def measured(self, request: Request) -> Response:
        return PlainTextResponse(self.metrics.text(self.service))

    async def described(self, request: Request) -> Response:
        return JSONResponse(openapi())


def _file(name: str, kind: str) -> Answer:
    async def answer(request: Request) -> Response:
        content = (_WEB / name).read_bytes()
        return Response(content, media_type=kind, headers={"content-security-policy": _POLICY})

    return answer


async def _nothing_here(request: Request, error: Exception) -> Response:
    status = getattr(error, "status_code", 404)
    said = {404: "there is nothing here; GET /openapi.json says what there is", 405: "not by this method"}
    return JSONResponse({"error": said[status]}, status)


def make_app(service: Service, *, token: str = "", hosts: tuple[str, ...] = ("*",), watch: float = 2.0) -> Starlette:
    """The application.

    Args:
      service: What answers.
      token: Secret that all but the page, its files, /health and /openapi.json ask for; empty for none.
      hosts: Names by which it may be asked for; other sites can point a name of theirs at this machine.
      watch: Seconds between looks whether the run has changed.
    """
    site = _Site(service, token)

    @contextlib.asynccontextmanager
    async def living(app: Starlette) -> AsyncIterator[None]:
        service.ended.clear()
        tasks = [asyncio.create_task(service.work()), asyncio.create_task(service.watch(watch))]
        # Until the first of them has begun, nothing can wait.
        await asyncio.sleep(0)
        yield
        for task in tasks:
            task.cancel()
        service.ended.set()

    routes = [
        site.route(path, method, site.posted(name, body, changes)) for path, method, name, body, changes in _ENDPOINTS
    ]
    routes += [
        site.route("/metrics", "GET", site.measured),
        site.route("/v1/picture", "GET", site.picture),
        site.route("/health", "GET", site.health, secret=False),
        site.route("/openapi.json", "GET", site.described, secret=False),
    ]
    files = {
        "/": "page.html",
        "/docs": "docs.html",
        "/page.css": "page.css",
        "/page.js": "page.js",
        "/docs.js": "docs.js",
    }
    kinds = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
    routes += [
        site.route(path, "GET", _file(name, kinds[Path(name).suffix]), secret=False) for path, name in files.items()
    ]
    return Starlette(
        routes=routes,
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=list(hosts))],
        exception_handlers={404: _nothing_here, 405: _nothing_here},
        lifespan=living,
    )


async def _body(request: Request, model: type[BaseModel]) -> Any:
    if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
        raise Refused(415, "send JSON, with the header 'Content-Type: application/json'")
    content = bytearray()
    async for part in request.stream():
        content += part
        if len(content) > LARGEST_BODY:
            raise Refused(413, f"more than {LARGEST_BODY:,} bytes; ask for less at a time")
    return model.model_validate_json(bytes(content))


def _refusal(error: Exception, service: Service) -> Response:
    """An error as an answer: what the asker can do about it, and nothing about this machine."""
    status, message = 500, "something went wrong here; the log of the service says what"
    if isinstance(error, Refused):
        status, message = error.status, str(error)
    elif isinstance(error, ValidationError):
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join(map(str, first["loc"]))
        status, message = 422, f"{where}: {first['msg']}" if where else first["msg"]
    elif isinstance(error, ValueError):
        message = " ".join(str(error).split()).replace(str(service.folder), "the run")
        status = 404 if message.startswith("unknown ") else 400
        message = message if len(message) <= 1_000 else f"{message[:1_000]} (…)"
    elif isinstance(error, Busy):
        status, message = 503, "too many requests wait; try again in a second"
    elif isinstance(error, TimeoutError):
        status, message = 504, f"no answer within {TIMEOUT:.0f} seconds"
    elif isinstance(error, ClientDisconnect):
        status, message = 400, "the request broke off"
    else:
        _log.error("a request failed", exc_info=error)
    headers = {"retry-after": "1"} if status == 503 else {"www-authenticate": "Bearer"} if status == 401 else None
    return JSONResponse({"error": message}, status, headers)


def openapi() -> dict[str, Any]:
    """The OpenAPI 3.1 description of the endpoints."""
    schemas: dict[str, Any] = {}
    paths: dict[str, Any] = {}
    for path, method, name, body, _ in _ENDPOINTS:
        schema = body.model_json_schema(ref_template="#/components/schemas/{model}")
        schemas |= schema.pop("$defs", {})
        schemas[body.__name__] = schema
        paths.setdefault(path, {})[method.lower()] = {
            "operationId": name,
            "summary": (getattr(Service, name).__doc__ or "").partition("\n")[0],
            "requestBody": {
                "required": True,
                "content": {"application/json": {"schema": {"$ref": f"#/components/schemas/{body.__name__}"}}},
            },
            "responses": _responses("application/json"),
        }
    parameters = [{"name": "item_id", "in": "query", "required": True, "schema": {"type": "string"}}]
    for path, summary, kind in (
        ("/v1/picture", "A small picture of an item.", "image/jpeg"),
        ("/health", "Whether it answers, and by what.", "application/json"),
        ("/metrics", "Counts and times, for Prometheus.", "text/plain"),
    ):
        paths[path] = {"get": {"summary": summary, "responses": _responses(kind)}}
    paths["/v1/picture"]["get"]["parameters"] = parameters
    secure = {"token": {"type": "http", "scheme": "bearer"}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "nqf", "version": __version__},
        "paths": paths,
        "components": {"schemas": schemas, "securitySchemes": secure},
        "security": [{}, {"token": []}],
    }


def _responses(kind: str) -> dict[str, Any]:
    error = {"type": "object", "properties": {"error": {"type": "string"}}}
    return {
        "200": {"description": "The answer.", "content": {kind: {}}},
        "4XX": {"description": "What is wrong.", "content": {"application/json": {"schema": error}}},
    }
