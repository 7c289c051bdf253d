"""The OpenAPI document says what the routes do, and its page needs nothing from elsewhere."""

import json
import re
from importlib import resources

from litestar.handlers import HTTPRouteHandler

from services.api import app, deployments, keys_routes, openapi
from services.api.batches import http as batches


def test_every_route_is_described_and_every_description_has_a_route() -> None:
    routes = {
        (re.sub(r":\w+}", "}", path), method.lower())
        for handler in (
            *vars(app).values(),
            *vars(batches).values(),
            *vars(keys_routes).values(),
            *deployments.HANDLERS,
        )
        if isinstance(handler, HTTPRouteHandler)
        for path in handler.paths
        for method in handler.http_methods
        if not path.startswith("/schema")
    }
    # The last part of a path can not be told apart by a route, where names hold slashes.
    routes.remove(("/v1/deployments/{name}", "post"))
    routes |= {(f"/v1/deployments/{{name}}/{action}", "post") for action in deployments.ACTIONS}
    described = {
        (path, method)
        for path, methods in openapi.build()["paths"].items()
        for method in methods
        if method != "parameters"
    }
    assert described == routes


def test_references_lead_somewhere() -> None:
    document = json.loads(openapi.document())
    names = set(re.findall(r'"#/components/schemas/(\w+)"', json.dumps(document)))
    assert names <= set(document["components"]["schemas"])
    chat = document["components"]["schemas"]["ChatCompletionRequest"]
    assert set(chat["required"]) == {"model", "messages"}
    assert chat["properties"]["store"]["enum"] == [False, None]
    assert "ToolParam" in json.dumps(chat["properties"]["tools"])
    assert "ResponseFormat" in json.dumps(chat["properties"]["response_format"])


def test_the_page_works_offline() -> None:
    page = resources.files("services.api").joinpath("static/schema.html").read_text()
    assert "http://" not in page
    assert "https://" not in page
    assert "/schema/openapi.json" in page
