"""A request with tools, made ready for its answer: how its model writes calls is looked up late."""

import dataclasses
import functools

from services.api.catalog import Catalog
from services.api.parsing import Parsed
from services.api.tool_calls import ToolParser
from services.api.tools import ToolUse


def with_tools(parsed: Parsed, catalog: Catalog, deployment: str) -> Parsed:
    """``parsed`` with its `tool_parser`, where it has tools. Raises ApiError where ``deployment``
    is known to know none.
    """
    if (tool_use := parsed.tool_use) is None:
        return parsed
    catalog.require_tools(deployment)
    # Only later: what nobody had looked at when the request came is known when it is answered.
    parser = functools.partial(_tool_parser, tool_use, catalog, deployment)
    return dataclasses.replace(parsed, tool_parser=parser)


def _tool_parser(tool_use: ToolUse, catalog: Catalog, deployment: str) -> ToolParser:
    return tool_use.parser(catalog.tool_format(deployment))
