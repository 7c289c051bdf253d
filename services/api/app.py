"""The routes. Parsing, waiting and answering are elsewhere; here they are put together."""

from collections.abc import Callable
from importlib import resources
from importlib.metadata import version
from typing import Annotated

import msgspec
from litestar import Litestar, Response, Router, get, post
from litestar.datastructures import State
from litestar.params import Parameter
from litestar.types import ASGIApp
from opentelemetry import trace

from schemas.requests import Prompt, SamplingParams
from services.api import deployments, errors, openapi
from services.api.batches.http import HANDLERS as BATCH_HANDLERS
from services.api.batches.http import Store, create_file
from services.api.call import Call
from services.api.catalog import Catalog
from services.api.embeddings import parse_embeddings, respond_embeddings
from services.api.exchange import HttpRequest, json_answer, read_body
from services.api.fan import open_fan
from services.api.fields import ignored_header
from services.api.guard import key_of
from services.api.keyring import Keyring
from services.api.keys_routes import KEY_ROUTES
from services.api.openai import ModelList
from services.api.parsing import Parsed, parse_chat, parse_completion
from services.api.progress import Progress
from services.api.relay import Relay
from services.api.respond import respond
from services.api.tenants import tenant_of
from services.api.timeouts import TIMEOUT_HEADER, timeout_of
from services.api.tokenize import (
    TokenQuestion,
    ask_tokenizer,
    parse_detokenize,
    parse_tokenize,
)
from services.api.tool_answers import with_tools
from services.api.tracing import Traced, request_id_of
from services.bus import Bus
from services.telemetry import ATTR_MODEL

# A queued request is its body without the fields that agents do not need, plus ids and a reply
# subject; together with the headers these are well below this.
ENVELOPE_BYTES = 16 * 1024


def build(
    bus: Bus,
    catalog: Catalog,
    relay: Relay,
    progress: Progress,
    store: Store,
    keyring: Keyring,
    *,
    max_body_bytes: int,
    progress_after_s: float,
    guard: Callable[[ASGIApp], ASGIApp],
) -> ASGIApp:
    """The ASGI application over a connected bus, and what was started over it.

    ``guard``: what is put around it.
    """
    app = Litestar(
        route_handlers=[
            chat_completions,
            completions,
            embeddings,
            tokenize,
            detokenize,
            list_models,
            get_model,
            *deployments.HANDLERS,
            Router("/", route_handlers=[create_file], request_max_body_size=store.max_body_bytes),
            *BATCH_HANDLERS,
            healthz,
            readyz,
            get_version,
            schema_page,
            openapi_json,
            *KEY_ROUTES,
        ],
        exception_handlers=errors.EXCEPTION_HANDLERS,
        openapi_config=None,  # ours is made from the wire structs, see services.api.openapi
        logging_config=None,
        request_max_body_size=min(max_body_bytes, bus.max_payload - ENVELOPE_BYTES),
        state=State(
            {
                "bus": bus,
                "catalog": catalog,
                "relay": relay,
                "progress": progress,
                "progress_after_s": progress_after_s,
                "store": store,
                "keyring": keyring,
            }
        ),
    )
    return Traced(guard(app))


# -- answers from models -------------------------------------------------------------------


@post("/v1/chat/completions", status_code=200)
async def chat_completions(request: HttpRequest, state: State) -> ASGIApp:
    """Continue a chat, streamed or whole."""
    return await _generate(
        request, state, parse_chat(await read_body(request), state.catalog.prepare)
    )


@post("/v1/completions", status_code=200)
async def completions(request: HttpRequest, state: State) -> ASGIApp:
    """Continue a text, streamed or whole."""
    parsed = parse_completion(await read_body(request), state.catalog.prepare)
    return await _generate(request, state, parsed)


@post("/v1/embeddings", status_code=200)
async def embeddings(request: HttpRequest, state: State) -> ASGIApp:
    """Texts or token ids as vectors."""
    catalog: Catalog = state.catalog
    relay: Relay = state.relay
    parsed = parse_embeddings(await read_body(request), catalog.prepare)
    trace.get_current_span().set_attribute(ATTR_MODEL, parsed.model)
    key = key_of(request.scope)
    deployment = catalog.require(parsed.model, "embed", parsed.dimensions or 0, key=key)
    request_id = request_id_of(request.scope)
    tenant = tenant_of(request.headers.get("authorization"))
    what = (deployment, parsed.inputs, parsed.dimensions)
    timeout_s = timeout_of(request.headers.get(TIMEOUT_HEADER), parsed.timeout_s)
    call = await relay.open_embed(request_id, *what, tenant=tenant, timeout_s=timeout_s)
    return await respond_embeddings(parsed, call, relay, request.receive)


@post(["/tokenize", "/v1/tokenize"], status_code=200)
async def tokenize(request: HttpRequest, state: State) -> Response[bytes]:
    """The tokens of a text or a chat, by the model's tokenizer."""
    asked = parse_tokenize(await read_body(request))
    return await _ask_tokenizer(request, state, asked)


@post(["/detokenize", "/v1/detokenize"], status_code=200)
async def detokenize(request: HttpRequest, state: State) -> Response[bytes]:
    """The text of tokens, by the model's tokenizer."""
    asked = parse_detokenize(await read_body(request))
    return await _ask_tokenizer(request, state, asked)


async def _ask_tokenizer(
    request: HttpRequest, state: State, asked: TokenQuestion
) -> Response[bytes]:
    trace.get_current_span().set_attribute(ATTR_MODEL, asked.ask.model)
    catalog: Catalog = state.catalog
    deployment = catalog.require(asked.ask.model, "any", key=key_of(request.scope))
    answer = await ask_tokenizer(state.bus, asked, deployment)
    return json_answer(answer, headers=ignored_header(asked.ignored))


async def _generate(request: HttpRequest, state: State, parsed: Parsed) -> ASGIApp:
    trace.get_current_span().set_attribute(ATTR_MODEL, parsed.model)
    catalog: Catalog = state.catalog
    relay: Relay = state.relay
    deployment = catalog.require(parsed.model, key=key_of(request.scope))
    parsed = with_tools(parsed, catalog, deployment)
    request_id = request_id_of(request.scope)
    tenant = tenant_of(request.headers.get("authorization"))
    timeout_s = timeout_of(request.headers.get(TIMEOUT_HEADER), parsed.timeout_s)

    async def open_one(name: str, prompt: Prompt, sampling: SamplingParams) -> Call:
        what = (deployment, prompt, sampling)
        return await relay.open(name, *what, tenant=tenant, timeout_s=timeout_s)

    fan = await open_fan(parsed, request_id, relay, open_one)
    return await respond(parsed, fan, request.receive, state.progress, state.progress_after_s)


# -- models --------------------------------------------------------------------------------


@get("/v1/models")
async def list_models(request: HttpRequest, state: State) -> Response[bytes]:
    """Every deployment that the key allows, with where it is."""
    catalog: Catalog = state.catalog
    return json_answer(ModelList(catalog.models(key_of(request.scope))))


@get("/v1/models/{model_id:path}")
async def get_model(
    request: HttpRequest,
    state: State,
    model_id: Annotated[str, Parameter(description="may hold slashes")],
) -> Response[bytes]:
    """One deployment, with where it is."""
    catalog: Catalog = state.catalog
    return json_answer(catalog.model(str(model_id).removeprefix("/"), key_of(request.scope)))


# -- health --------------------------------------------------------------------------------


class Health(msgspec.Struct):
    status: str
    missing: list[str] = []


@get(["/healthz", "/health", "/ping"])
async def healthz() -> Response[bytes]:
    """200 while the process lives. The other two are its names at vLLM."""
    return json_answer(Health("ok"))


class Version(msgspec.Struct):
    version: str


@get("/version")
async def get_version() -> Response[bytes]:
    """Of this server."""
    return json_answer(Version(version("hotswap")))


@get("/readyz")
async def readyz(state: State) -> Response[bytes]:
    """200 when a request could be answered, else 503 with what is missing."""
    bus: Bus = state.bus
    catalog: Catalog = state.catalog
    missing = catalog.missing()
    if not bus.is_connected:
        missing.insert(0, "no connection to NATS")
    if missing:
        answer = json_answer(Health("not ready", missing), status=503)
        answer.headers["retry-after"] = str(errors.RETRY_AFTER_S)
        return answer
    return json_answer(Health("ready"))


# -- this interface, described -------------------------------------------------------------


@get("/schema")
async def schema_page() -> Response[bytes]:
    """A page that shows openapi.json; it loads nothing from elsewhere."""
    page = resources.files("services.api").joinpath("static/schema.html").read_bytes()
    return Response(page, media_type="text/html; charset=utf-8")


@get("/schema/openapi.json")
async def openapi_json() -> Response[bytes]:
    """The OpenAPI document."""
    return Response(openapi.document(), media_type="application/json")
