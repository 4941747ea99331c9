"""The paths: FastAPI routes over workers."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from regpt.errors import nearest
from regpt.serve.answers import Answer, event_text
from regpt.serve.checkpoints import Checkpoints
from regpt.serve.explain import EXPLAIN, explanation
from regpt.serve.fields import (
    CHAT,
    CHAT_NEUTRAL,
    COMPLETIONS,
    COMPLETIONS_NEUTRAL,
    RESPONSES,
    RESPONSES_NEUTRAL,
    ApiError,
    described,
    read_json_object,
    shown,
)
from regpt.serve.gate import SEND, Gate
from regpt.serve.metrics import Timings, metrics_text
from regpt.serve.page import POLICY, page_files
from regpt.serve.paths import ServedModel, chat, completion, response
from regpt.serve.worker import Limits

BODY_SECONDS = 30.0  # for a body to arrive
GRACE_SECONDS = 5.0  # for a client to read that its time is up
Make = Callable[[ServedModel, Mapping[str, Any], Limits], Awaitable[tuple[Answer, bool]]]


class Service:
    """Models by id, the checkpoints of their runs, limits, and timings."""

    def __init__(self, models: Sequence[ServedModel], limits: Limits, checkpoints: Checkpoints | None):
        self.models, self.limits, self.timings = {one.id: one for one in models}, limits, Timings()
        self.checkpoints = checkpoints

    def describe(self, model: ServedModel) -> dict[str, Any]:
        steps = sorted(self.checkpoints.folders(model.id)) if self.checkpoints else []
        return model.description() | ({"checkpoints": steps} if steps else {})

    async def find(self, name: Any) -> ServedModel:
        if name is None:
            raise ApiError("model is missing", param="model", code="missing_required_parameter")
        found = self.models.get(name) if isinstance(name, str) else None
        if found is None and self.checkpoints and isinstance(name, str):
            found = await self.checkpoints.find(name)
        if found is None:
            names = ", ".join(self.models)
            message = f"there is no model {shown(name)}{nearest(str(name), self.models)}; this server has {names}"
            id = str(name).rpartition(":")[0]
            if steps := self.checkpoints and id in self.models and sorted(self.checkpoints.folders(id)):
                message += f", and of {id} the checkpoints {', '.join(f'{id}:{step}' for step in steps[-8:])}"
            raise ApiError(message, param="model", code="model_not_found", status=404)
        return found

    async def answer(self, request: Request, make: Make) -> Response:
        """Read the body, hand the job to the model's worker, answer whole or as a stream."""
        body = read_json_object(await self.body(request))
        model = await self.find(body.get("model"))
        answer, stream = await make(model, body, self.limits)
        answer.job.streams = stream
        model.worker.submit(answer.job)
        if stream:
            return EventStream(self, model, answer)
        finished = asyncio.ensure_future(self.collect(answer))
        try:
            await finish_first(finished, request.receive, self.limits.seconds)
        finally:
            model.worker.release(answer.job)
        if finished.cancelled():
            return Response(status_code=499)  # nobody reads it
        return JSONResponse(finished.result())

    async def body(self, request: Request) -> bytes:
        """The body, no longer than allowed.

        Raises:
            ApiError: 413, or 408 where it does not arrive.
        """
        most, data = self.limits.body_bytes, bytearray()
        try:
            async with asyncio.timeout(BODY_SECONDS):
                async for part in request.stream():
                    data += part
                    if len(data) > most:
                        message = f"the body has more than {most} bytes, which is the most that is allowed"
                        raise ApiError(message, status=413, code="body_too_large", headers={"Connection": "close"})
        except TimeoutError:
            raise ApiError(f"the body did not arrive within {BODY_SECONDS:g} s", status=408) from None
        return bytes(data)

    async def collect(self, answer: Answer) -> dict[str, Any]:
        async for batch in answer.job.batches(self.limits.seconds):
            self.timings.note(answer.job, batch)
            answer.add(batch)
        return answer.shape.whole(answer)


class EventStream(Response):
    """Server-sent events of an answer; a client that goes away ends it."""

    def __init__(self, service: Service, model: ServedModel, answer: Answer):
        super().__init__(media_type="text/event-stream")
        del self.headers["content-length"]
        self.service, self.model, self.answer = service, model, answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        writing = asyncio.ensure_future(self.write(send, scope[SEND]))
        try:
            await finish_first(writing, receive, self.service.limits.seconds)
        finally:
            self.model.worker.release(self.answer.job)
        if not writing.cancelled():
            writing.result()

    async def write(self, send: Send, send_body: Send) -> None:
        answer, shape = self.answer, self.answer.shape

        async def emit(text: str, last: bool = False) -> None:
            if text or last:
                await send_body({"type": "http.response.body", "body": text.encode(), "more_body": not last})

        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            await emit("".join(map(event_text, shape.opening(answer))))
            async for batch in answer.job.batches(self.service.limits.seconds):
                self.service.timings.note(answer.job, batch)
                await emit("".join(map(answer.events, answer.add(batch))))
            await emit("".join(map(event_text, [*shape.closing(answer), *shape.ending])), last=True)
        except ApiError as error:  # the status is sent: the error is an event, and no [DONE] follows
            await emit(event_text(error.body), last=True)


async def until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def finish_first(work: asyncio.Future[Any], receive: Receive, seconds: float) -> None:
    """Wait for `work`; cancel it when the client is gone, or reads so slowly that the time is up."""
    gone = asyncio.ensure_future(until_gone(receive))
    try:
        await asyncio.wait({work, gone}, timeout=seconds + GRACE_SECONDS, return_when=asyncio.FIRST_COMPLETED)
    finally:
        gone.cancel()
        if not work.done():
            work.cancel()
        await asyncio.wait({work, gone})


def make_app(
    models: Sequence[ServedModel], limits: Limits, token: str = "", checkpoints: Checkpoints | None = None
) -> Gate:
    """The application: models, behind the gate."""
    service = Service(models, limits, checkpoints)
    app = FastAPI(title="regpt serve", docs_url=None, redoc_url=None)
    gate = Gate(app, token)

    @app.post("/v1/completions", openapi_extra=described(COMPLETIONS, ["model", "prompt"], COMPLETIONS_NEUTRAL))
    async def completions(request: Request) -> Response:
        return await service.answer(request, completion)

    @app.post("/v1/chat/completions", openapi_extra=described(CHAT, ["model", "messages"], CHAT_NEUTRAL))
    async def chat_completions(request: Request) -> Response:
        return await service.answer(request, chat)

    @app.post("/v1/responses", openapi_extra=described(RESPONSES, ["model", "input"], RESPONSES_NEUTRAL))
    async def responses(request: Request) -> Response:
        return await service.answer(request, response)

    @app.post("/v1/explain", openapi_extra=described(EXPLAIN, ["model", "seed"]))
    async def explained(request: Request) -> Response:
        body = read_json_object(await service.body(request))
        return JSONResponse(await explanation(await service.find(body.get("model")), body, limits))

    @app.get("/v1/models")
    async def models_list() -> dict[str, Any]:
        return {"object": "list", "data": [service.describe(one) for one in service.models.values()]}

    @app.get("/v1/models/{id:path}")
    async def model(request: Request) -> dict[str, Any]:
        return service.describe(await service.find(request.path_params["id"]))

    @app.head("/health", include_in_schema=False)
    @app.get("/health")
    async def health() -> Response:
        failed = [one.worker.failure for one in service.models.values() if one.worker.failure]
        body = {"status": "failed", "reason": failed[0]} if failed else {"status": "ok"}
        return JSONResponse(body, 503 if failed else 200)

    @app.get("/metrics")
    async def metrics() -> Response:
        return PlainTextResponse(await metrics_text(service.models.values(), gate, service.timings))

    add_page(app)
    add_handlers(app)
    return gate


def add_page(app: FastAPI) -> None:
    """The page's files, as they are at the start."""
    for path, (kind, content) in page_files().items():
        response = Response(content, media_type=kind, headers={"Content-Security-Policy": POLICY})
        app.api_route(path, methods=["GET", "HEAD"], include_in_schema=False)(lambda response=response: response)


def add_handlers(app: FastAPI) -> None:
    """Every error in OpenAI's shape."""

    @app.exception_handler(ApiError)
    async def refused(request: Request, error: Exception) -> Response:
        assert isinstance(error, ApiError)
        return JSONResponse(error.body, error.status, error.headers)

    @app.exception_handler(HTTPException)
    async def no_path(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        said = "there is no path" if error.status_code == 404 else f"{request.method} is not allowed at"
        body = ApiError(f"{said} {shown(request.url.path)}", status=error.status_code, code="unknown_url").body
        return JSONResponse(body, error.status_code, error.headers)

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:
        return JSONResponse(ApiError(f"the server failed: {type(error).__name__}", status=500).body, 500)
