"""What an answer must look like: the fields that say so -> a `Grammar`, at most one.

OpenAI's response_format, vLLM's structured_outputs, and vLLM's older guided_*. What kind of text it
is, is checked here; whether it is a grammar that can be followed is found by the agent, whose
library knows.
"""

from typing import Any

import msgspec

from schemas.requests import Grammar, GrammarKind
from services.api.errors import ApiError, invalid
from services.api.fields import show
from services.api.openai import ResponseFormat, SamplingFields, StructuredOutputs

_UNSUPPORTED = (
    "structural_tag",
    "whitespace_pattern",
    "disable_any_whitespace",
    "disable_additional_properties",
)


def grammar_of(request: SamplingFields) -> Grammar | None:
    """Raises ApiError (400): two at once, or something that is none."""
    found = [
        *_response_format(request.response_format),
        *_structured(request.structured_outputs),
        *_json("guided_json", request.guided_json),
        *_text("guided_regex", "regex", request.guided_regex),
        *_choice("guided_choice", request.guided_choice or None),
        *_text("guided_grammar", "grammar", request.guided_grammar),
    ]
    if len(found) > 1:
        first, second = found[0].field, found[1].field
        words = f"{first} and {second} both say what the answer must be: send one of them."
        raise invalid(second, words)
    return found[0] if found else None


def _response_format(given: ResponseFormat | None) -> list[Grammar]:
    if given is None:
        return []
    if given.json_schema is not None and given.type != "json_schema":
        words = f"response_format.json_schema does not go with type = {show(given.type)}; "
        raise invalid("response_format.type", words + 'for a schema send type = "json_schema".')
    match given.type:
        case "text":
            return []
        case "json_object":
            return [Grammar("json_object", "", "response_format")]
        case "json_schema":
            field = "response_format.json_schema"
            if given.json_schema is None:
                raise invalid(field, f"{field} is required and missing.", "missing_field")
            return _json(f"{field}.schema", given.json_schema.schema)
        case _:
            words = f"response_format.type = {show(given.type)} is not supported by this server; "
            words += 'send "text", "json_object" or "json_schema".'
            raise ApiError(400, "unsupported_parameter", words, param="response_format.type")


def _structured(given: StructuredOutputs | None) -> list[Grammar]:
    if given is None:
        return []
    for key in _UNSUPPORTED:
        if (value := getattr(given, key)) not in (None, False):
            field = f"structured_outputs.{key}"
            words = f"{field} = {show(value)} is not supported by this server; leave it out."
            raise ApiError(400, "unsupported_parameter", words, param=field)
    field = "structured_outputs"
    found = [
        *_json(f"{field}.json", given.json),
        *_text(f"{field}.regex", "regex", given.regex),
        *_choice(f"{field}.choice", given.choice),
        *_text(f"{field}.grammar", "grammar", given.grammar),
    ]
    if given.json_object:
        found.append(Grammar("json_object", "", f"{field}.json_object"))
    if not found:
        words = f"{field} asks for nothing: send one of json, regex, choice, grammar, json_object."
        raise invalid(field, words)
    return found


def _json(field: str, schema: Any) -> list[Grammar]:
    """``schema``: a JSON schema, or the JSON text of one."""
    if schema is None:
        return []
    if isinstance(schema, str):
        try:
            schema = msgspec.json.decode(schema)
        except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
            raise invalid(field, f"{field} = {show(schema)} is not JSON: {error}.") from error
    if not isinstance(schema, dict | bool):
        words = f"{field} = {show(schema)} must be a JSON schema: an object."
        raise invalid(field, words, "invalid_type")
    return [Grammar("json_schema", msgspec.json.encode(schema).decode(), field)]


def _text(field: str, kind: GrammarKind, text: str | None) -> list[Grammar]:
    if text is None:
        return []
    if not text:
        raise invalid(field, f"{field} = '' must not be empty.")
    return [Grammar(kind, text, field)]


def _choice(field: str, options: list[str] | None) -> list[Grammar]:
    if options is None:
        return []
    if not options or "" in options:
        words = f"{field} = {show(options)} must hold at least one string, and no empty one."
        raise invalid(field, words)
    return [Grammar("choice", msgspec.json.encode(options).decode(), field)]
