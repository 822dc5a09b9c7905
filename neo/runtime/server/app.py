"""The HTTP interface: OpenAI's routes, tokens, health, metrics."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI, Request, Response
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware

from neo import __version__
from neo.core.errors import InputError
from neo.runtime.server.answers import Answers, ChatAnswers
from neo.runtime.server.bridge import Bridge
from neo.runtime.server.errors import ApiError, bad, server_error
from neo.runtime.server.generation import Generation, Wanted
from neo.runtime.server.limits import Keys, ServerLimits, read_body
from neo.runtime.server.logs import LogMiddleware, RequestLog
from neo.runtime.server.metrics import CONTENT_TYPE, Metrics, about_engine
from neo.runtime.server.schemas import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)
from neo.runtime.server.streams import GenerationResponse, JsonResponse, error_response
from neo.runtime.server.text import TextSide
from neo.runtime.server.wanted import Reader, parse

_ERRORS = {
    400: "a field is wrong; the error names it",
    401: "no valid API key",
    404: "no such model",
    408: "the body did not come, or the client does not read",
    413: "the body is too large",
    500: "the policy or the engine failed",
    503: "the queue is full, or the server is ending",
    504: "the request took longer than the server allows",
}


@dataclass(slots=True)
class Server:
    """What the routes work on.

    Attributes:
        draining: set when the server is to end: nothing new is taken.
        open: generations that have not ended.
    """

    bridge: Bridge
    text: TextSide
    metrics: Metrics
    log: RequestLog
    limits: ServerLimits
    names: Sequence[str]
    keys: Keys
    reader: Reader
    cors_origins: Sequence[str] = ()
    draining: bool = False
    open: set[Generation] = field(default_factory=set)
    created: int = field(default_factory=lambda: int(time.time()))

    def refuse_if_ending(self) -> None:
        """Raise the ApiError where nothing new can be taken."""
        if self.bridge.dead is not None:
            raise server_error(f"the engine is gone: {self.bridge.dead}", 503)
        if self.draining:
            raise ApiError(503, "the server is ending", "overloaded_error", retry_after_s=5)

    def health(self) -> None:
        """Raise the ApiError if the server should get no more work."""
        self.refuse_if_ending()

    def generation(self, wanted: Wanted, arrival_s: float) -> Generation:
        """Begin one; it is in ``open`` until it is closed."""
        return Generation(self.bridge, self.text, wanted, self.limits, arrival_s, self.open)


Handler = Callable[[Server, bytes, Request], Awaitable[Response]]


async def _completions(server: Server, body: bytes, request: Request) -> Response:
    arrival = time.perf_counter()
    given = parse(CompletionRequest, body)
    wanted = await server.reader.completion(given)
    if server.log.prompts:
        request.state.note["prompt"] = given.prompt
    answers = Answers(given, wanted, given.model or server.names[0], server.text)
    return _begin(server, request, wanted, answers, bool(given.stream), arrival)


async def _chat(server: Server, body: bytes, request: Request) -> Response:
    arrival = time.perf_counter()
    given = parse(ChatRequest, body)
    wanted = await server.reader.chat(given)
    if server.log.prompts:
        request.state.note["prompt"] = [m.model_dump(exclude_none=True) for m in given.messages]
    answers = ChatAnswers(given, wanted, given.model or server.names[0], server.text)
    return _begin(server, request, wanted, answers, bool(given.stream), arrival)


def _begin(
    server: Server, request: Request, wanted: Wanted, answers: Answers, stream: bool, arrival_s: float
) -> Response:
    request.state.note["id"] = wanted.id
    server.refuse_if_ending()
    return GenerationResponse(server.generation(wanted, arrival_s), answers, stream)


async def _tokenize(server: Server, body: bytes, _request: Request) -> Response:
    given = parse(TokenizeRequest, body)
    reader = server.reader
    reader.check_model(given.model)
    if (given.prompt is None) == (given.messages is None):
        raise bad("prompt", "prompt: give either prompt or messages")
    if given.messages is not None:
        generate = given.add_generation_prompt is not False
        ids = reader.conversation(given.messages, generate=generate, resume=False)
    else:
        ids = await reader.encode(given.prompt or "", given.add_special_tokens is not False)
    return JsonResponse(
        {
            "count": len(ids),
            "max_model_len": reader.ready.max_model_len,
            "tokens": ids,
            "token_strs": [server.text.token(t) for t in ids] if given.return_token_strs else None,
        }
    )


async def _detokenize(server: Server, body: bytes, _request: Request) -> Response:
    given = parse(DetokenizeRequest, body)
    server.reader.check_model(given.model)
    vocab = server.reader.ready.vocab
    if any(not 0 <= t < vocab for t in given.tokens):
        raise bad("tokens", f"tokens: one is not in the vocabulary of {vocab}")
    return JsonResponse({"prompt": server.text.decode(given.tokens)})


_POSTS: tuple[tuple[str, Handler, type[BaseModel], str], ...] = (
    ("/v1/completions", _completions, CompletionRequest, "Complete a prompt."),
    ("/v1/chat/completions", _chat, ChatRequest, "Answer a conversation."),
    ("/tokenize", _tokenize, TokenizeRequest, "Tokens of a text or a conversation."),
    ("/detokenize", _detokenize, DetokenizeRequest, "Text of tokens."),
)


def make_app(server: Server) -> FastAPI:
    """The application."""
    middleware = [Middleware(LogMiddleware, log=server.log, answered=server.metrics.answered)]
    if server.cors_origins:
        middleware.append(
            Middleware(
                CORSMiddleware,
                allow_origins=list(server.cors_origins),
                allow_methods=["*"],
                allow_headers=["*"],
            )
        )
    app = FastAPI(title="neo", version=__version__, docs_url=None, redoc_url=None, middleware=middleware)
    for path, handler, schema, summary in _POSTS:
        _add_post(app, server, path, handler, schema, summary)
    _add_gets(app, server)
    _add_errors(app, server)
    return app


def _add_post(
    app: FastAPI, server: Server, path: str, handler: Handler, schema: type[BaseModel], summary: str
) -> None:
    """A route whose body is read and understood here: FastAPI's own reader has no bounds."""

    async def route(request: Request) -> Response:
        server.keys.check(request)
        return await handler(server, await read_body(request, server.limits), request)

    described = schema.model_json_schema(ref_template=f"#/components/schemas/{schema.__name__}-{{model}}")
    nested = described.pop("$defs", {})
    app.state.schemas = getattr(app.state, "schemas", {})
    app.state.schemas |= {f"{schema.__name__}-{name}": d for name, d in nested.items()}
    app.add_api_route(
        path,
        route,
        methods=["POST"],
        summary=summary,
        response_class=JsonResponse,
        responses={status: {"description": why} for status, why in _ERRORS.items()},
        openapi_extra={
            "requestBody": {"required": True, "content": {"application/json": {"schema": described}}}
        },
    )


def _add_gets(app: FastAPI, server: Server) -> None:
    def model(name: str) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": server.created,
            "owned_by": "neo",
            "root": server.names[0],
            "parent": None,
            "max_model_len": server.reader.ready.max_model_len,
        }

    @app.get("/v1/models", summary="The models that are served.")
    async def models(request: Request) -> Response:
        server.keys.check(request)
        return JsonResponse({"object": "list", "data": [model(name) for name in server.names]})

    @app.get("/v1/models/{name:path}", summary="One of them.", responses={404: {"description": _ERRORS[404]}})
    async def one_model(name: str, request: Request) -> Response:
        server.keys.check(request)
        server.reader.check_model(name)
        return JsonResponse(model(name))

    @app.get(
        "/health", summary="Whether the server takes work.", responses={503: {"description": _ERRORS[503]}}
    )
    async def health() -> Response:
        server.health()
        return JsonResponse({"status": "ok"})

    @app.get("/metrics", summary="Metrics for Prometheus.")
    async def metrics() -> Response:
        return Response(server.metrics.page(), media_type=CONTENT_TYPE)

    @app.get("/version", summary="The version of neo, and what serves: device, executor, policy, cost model.")
    async def version() -> Response:
        return JsonResponse({"version": __version__, **about_engine(server.reader.ready)})

    for path, handler in (("/health", health), ("/metrics", metrics), ("/version", version)):
        app.add_api_route(path, handler, methods=["HEAD"], include_in_schema=False)  # what some probes send


def _add_errors(app: FastAPI, server: Server) -> None:
    async def api_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, ApiError)
        request.state.note["error"] = error.message
        return error_response(error)

    async def http_error(_request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        answer = error_response(ApiError(error.status_code, str(error.detail)))
        answer.headers.update(error.headers or {})
        return answer

    async def fault(request: Request, error: Exception) -> Response:
        return error_response(server_error(f"{type(error).__name__}: a fault of the server"))

    async def input_error(request: Request, error: Exception) -> Response:
        return error_response(bad(None, str(error)))

    app.add_exception_handler(ApiError, api_error)
    app.add_exception_handler(InputError, input_error)
    app.add_exception_handler(HTTPException, http_error)
    app.add_exception_handler(Exception, fault)
    plain = app.openapi

    def openapi() -> dict[str, Any]:
        """FastAPI's description, with the bodies' nested schemas."""
        found = plain()
        found.setdefault("components", {}).setdefault("schemas", {}).update(app.state.schemas)
        return found

    app.openapi = openapi  # type: ignore[method-assign]
