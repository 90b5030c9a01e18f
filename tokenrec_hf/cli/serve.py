"""The service of `tokenrec serve`: recommendations and similar items of one repository over HTTP, as JSON.

All requests are answered by one thread, so that the threads of torch never compete, and each by one [`Recommender`], so that no
answer mixes two states of the repository. The service opens the repository again when its store has changed.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import socket
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from .. import __version__
from ..models.codes import MANIFEST, RepositoryFolder, current
from ..models.embedding_store import Store
from ..models.recommender import OnUnknown, Recommendation, Recommender
from ..repository.onnx import use_onnx
from ..repository.repository import Repository
from .naming import item_titles
from .output import note

try:
    import uvicorn
    from fastapi import FastAPI, Request, Response
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import JSONResponse
except ImportError:
    raise ImportError('the service needs FastAPI and uvicorn: pip install "tokenrec-hf[serve]".') from None

MAX_BATCH, MAX_HISTORY, MAX_TOP_K = 256, 10_000, 1_000
# Seconds between two looks at the repository, and the most that a shutdown waits for open requests.
WATCH_EVERY, SHUTDOWN = 1.0, 30

Scalar = str | bool | int | float
Ids = Annotated[list[str], Field(max_length=MAX_HISTORY)]


class Body(BaseModel):
    """What all requests and answers have in common: no values of another type, no unknown names."""

    model_config = ConfigDict(strict=True, extra="forbid")


class Query(Body):
    """One request: a user, a history, or both."""

    user: str | None = Field(None, description="User id; without it, the history alone.", examples=["u001"])
    history: Ids | None = Field(
        None, description="Item ids, oldest first; by default those in the store.", examples=[["f026", "f036"]]
    )


class Search(Body):
    """The options of both searches."""

    top_k: int = Field(10, ge=1, le=MAX_TOP_K, description="Number of items.")
    where: dict[str, Scalar | Annotated[list[Scalar], Field(max_length=MAX_BATCH)]] | None = Field(
        None,
        max_length=MAX_BATCH,
        description="Only items with this metadata; values of a list are alternatives.",
        examples=[None],
    )


class RecommendRequest(Search):
    """The body of `/recommend`."""

    requests: list[Query] = Field(min_length=1, max_length=MAX_BATCH)
    exclude_seen: bool = Field(True, description="Leave out the items of the histories and those seen by the users.")
    on_unknown: OnUnknown = Field(
        "error", description="Refuse unknown users and items, leave them out, or answer with popular items."
    )


class SimilarRequest(Search):
    """The body of `/similar`."""

    items: list[str] = Field(min_length=1, max_length=MAX_BATCH, description="Item ids.", examples=[["f026"]])


class Item(Body):
    """An item of an answer."""

    item: str = Field(examples=["f036"])
    score: float | None = Field(description="Cosine with the query; null for a popular item.", examples=[0.71])
    title: str | None = Field(examples=["The Last Harbor"])
    note: str = Field("", description="What was left out of the request, if anything was.", examples=[""])


class Answer(Body):
    """The answer to `/recommend` and `/similar`."""

    results: list[list[Item]] = Field(description="The items of each request, best first.")


class Health(Body):
    """The answer to `/health`."""

    status: Literal["ok"] = "ok"
    version: str = Field(description="Version of tokenrec-hf.", examples=["0.1.0"])
    users: int
    items: int
    space_ids: dict[str, str | None] = Field(description="The MQ-Tokenizers of users and items.")
    generation: str = Field(description="Hash of the store; it changes with each change of the repository.")


class Problem(Body):
    """Why a request was refused."""

    detail: str = Field(examples=["user 'nobody' is unknown."])


class Service:
    """The answers of one repository, which may be changed meanwhile.

    Args:
        repository: the repository.
        titles: of items that have no `title` in their metadata.
        store: replaces the repository's own store.
        onnx: a graph of the repository's T5, see [`use_onnx`].
    """

    def __init__(
        self,
        repository: Repository,
        titles: Mapping[str, str] | None = None,
        store: Store | None = None,
        onnx: str | None = None,
    ):
        self.repository, self.titles, self.store, self.onnx = repository, titles or {}, store, onnx
        self._opened = self._open()

    def refresh(self) -> bool:
        """Opens the repository again if it has changed, and returns whether it has.

        Raises:
            OSError: the repository is gone.
            ValueError: it is damaged, or a change is under way. The former state goes on to answer.
        """
        changed = self._generation() != self._opened[1]
        if changed:
            self._opened = self._open()
        return changed

    def recommend(self, request: RecommendRequest) -> dict[str, Any]:
        """The best items for each request."""
        recommender, _ = self._opened
        found = recommender.recommend(
            [query.user for query in request.requests],
            [query.history for query in request.requests],
            top_k=request.top_k,
            exclude_seen=request.exclude_seen,
            where=request.where,
            on_unknown=request.on_unknown,
        )
        return self._answer(recommender, found)

    def similar(self, request: SimilarRequest) -> dict[str, Any]:
        """The items nearest to each item."""
        recommender, _ = self._opened
        return self._answer(
            recommender, recommender.similar_items(request.items, top_k=request.top_k, where=request.where)
        )

    def health(self) -> dict[str, Any]:
        """Version, contents and state."""
        recommender, generation = self._opened
        store, space_ids = recommender.store, dict(recommender.tokenizer.space_ids)
        counts = {"users": store.count("user"), "items": store.count("item")}
        return {"status": "ok", "version": __version__, **counts, "space_ids": space_ids, "generation": generation}

    def _open(self) -> tuple[Recommender, str]:
        # In this order, a change that is made meanwhile is noticed later.
        generation = self._generation()
        recommender = self.repository.recommender(self.store)
        if self.onnx is not None:
            use_onnx(recommender, self.onnx)
        # Otherwise it is loaded for the first anonymous user, when the folder may be in another state.
        _ = recommender.history_encoder
        return recommender, generation

    def _generation(self) -> str:
        # Every change replaces the manifest; readers see it from its commit on.
        manifest = current(RepositoryFolder(self.repository.folder).store) / MANIFEST
        return hashlib.sha256(manifest.read_bytes()).hexdigest()[:16]

    def _answer(self, recommender: Recommender, found: list[list[Recommendation]]) -> dict[str, Any]:
        titles = iter(item_titles(recommender, self.titles, [one["item"] for row in found for one in row]))
        return {"results": [[{**one, "title": next(titles)} for one in row] for row in found]}


def create_app(service: Service) -> FastAPI:
    """The web application of a service; [`run`] serves it, and so does any other ASGI server with one worker a process."""
    worker = ThreadPoolExecutor(1, "tokenrec")

    async def answer(work: Callable[[Any], dict[str, Any]], request: Body) -> Response:
        def encoded() -> bytes:
            return json.dumps(work(request), ensure_ascii=False).encode()

        # Encoded by the worker too: it takes milliseconds for a large batch, in which no other request would be accepted.
        content = await asyncio.get_running_loop().run_in_executor(worker, encoded)
        return Response(content, media_type="application/json")

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        watching = asyncio.create_task(_watch(service))
        yield
        watching.cancel()
        worker.shutdown()

    app = FastAPI(
        title="tokenrec",
        version=__version__,
        lifespan=lifespan,
        # The pages that show the API load scripts of other hosts.
        docs_url=None,
        redoc_url=None,
        responses={422: {"model": Problem, "description": "The request is invalid, or an id is unknown."}},
    )

    @app.exception_handler(RequestValidationError)
    def invalid(_: Request, error: RequestValidationError) -> Response:
        # Of a value with several types, the first error is that it has not the first type.
        return _problem(_sentence(max(error.errors(), key=lambda one: one["type"] == "too_long")))

    @app.exception_handler(400)
    def unreadable(_: Request, error: Exception) -> Response:
        return _problem("body: no JSON text in UTF-8, or too many brackets in one another.")

    @app.exception_handler(ValueError)
    @app.exception_handler(KeyError)
    def refused(_: Request, error: Exception) -> Response:
        return _problem(str(error.args[0]) if error.args else str(error))

    @app.post("/recommend", response_model=Answer, summary="Recommend items to users or histories")
    async def recommend(request: RecommendRequest) -> Response:
        return await answer(service.recommend, request)

    @app.post("/similar", response_model=Answer, summary="List the items most similar to items")
    async def similar(request: SimilarRequest) -> Response:
        return await answer(service.similar, request)

    @app.get("/health", response_model=Health, summary="Version, contents and state")
    async def health() -> dict[str, Any]:
        return service.health()

    return app


def run(service: Service, listener: socket.socket) -> None:
    """Serves until SIGINT or SIGTERM; requests that have been accepted are answered before."""
    config = uvicorn.Config(
        create_app(service), log_level="warning", access_log=False, timeout_graceful_shutdown=SHUTDOWN
    )
    with contextlib.suppress(KeyboardInterrupt):
        uvicorn.Server(config).run([listener])


def listen(host: str, port: int) -> socket.socket:
    """A socket that is bound to a port.

    Raises:
        OSError: the port is taken, or the host is none of this machine's.
    """
    try:
        listener = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise OSError(f"{host}:{port} cannot be served ({error.strerror}); give another --port or --host.") from None
    # Connections inherit it. Without it, the end of an answer would wait 40 ms for the client to acknowledge the beginning.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def address(listener: socket.socket) -> str:
    """The URL of a bound socket."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


async def _watch(service: Service) -> None:
    """Opens the repository again after its changes; requests are answered meanwhile."""
    said = None
    while True:
        await asyncio.sleep(WATCH_EVERY)
        try:
            if await asyncio.to_thread(service.refresh):
                note(f"{service.repository.folder} has changed and was opened again.")
            said = None
        # Whatever is wrong with the new state, the former one goes on to answer.
        except Exception as error:
            if str(error) != said:
                note(f"{service.repository.folder} has changed and cannot be opened yet: {error}", style="red")
            said = str(error)


def _sentence(error: Mapping[str, Any]) -> str:
    place, message = ".".join(map(str, error["loc"])), error["msg"]
    # "JSON" keeps its capitals.
    first = message[:1] if message[:2].isupper() else message[:1].lower()
    return f"{place}: {first}{message[1:]}."


def _problem(sentence: str) -> Response:
    return JSONResponse({"detail": sentence}, status_code=422)
