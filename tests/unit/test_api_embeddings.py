"""Bodies of /v1/embeddings, and vectors put together from chunks."""

import json
import struct
from typing import Any

import pytest

from schemas.state import DeploymentRecord, ModelFacts, ModelSpec, Runner
from schemas.stream import Vectors
from services.api.embeddings import MAX_INPUTS, ParsedEmbeddings, parse_embeddings
from services.api.errors import ApiError
from services.api.vectors import VectorAnswer
from tests.unit import tiny_embedders
from tests.unit.test_api_catalog import catalog, gone

__all__ = ["catalog", "gone"]  # fixtures


def parse(**body: Any) -> ParsedEmbeddings:
    return parse_embeddings(json.dumps({"model": "m", "input": "hi"} | body).encode())


@pytest.mark.parametrize(
    ("given", "inputs"),
    [
        ("hi", ("hi",)),
        (["hi", "ho"], ("hi", "ho")),
        ([1, 2, 3], ((1, 2, 3),)),
        ([[1, 2], [3]], ((1, 2), (3,))),
        (["hi", [3]], ("hi", (3,))),
    ],
)
def test_inputs_in_every_form(given: Any, inputs: tuple[Any, ...]) -> None:
    assert parse(input=given).inputs == inputs


def test_the_other_fields() -> None:
    plain = parse()
    assert (plain.encoding, plain.dimensions, plain.ignored) == ("float", None, [])
    full = parse(encoding_format="base64", dimensions=5, user="ada", made_up=1, priority=0)
    assert (full.encoding, full.dimensions, full.ignored) == ("base64", 5, ["made_up"])


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"input": ""}, "input", "input = '' must not be empty"),
        ({"input": []}, "input", "1 to 2048"),
        ({"input": ["x"] * (MAX_INPUTS + 1)}, "input", "2049 entries"),
        ({"input": ["x", ""]}, "input", "input[1] = ''"),
        ({"input": [[]]}, "input", "input[0] = []"),
        ({"input": [1, "x"]}, "input", "'x', which is no token id"),
        ({"input": ["x", 1]}, "input", "can not stand in one list"),
        ({"input": [3, -1]}, "input", "-1 is not a token id"),
        ({"input": {"a": 1}}, "input", "input = {'a': 1}"),
        ({"input": None}, "input", "input = null"),
        ({"dimensions": 0}, "dimensions", "must be 1 or more"),
        ({"encoding_format": "int8"}, "encoding_format", "'int8'"),
        ({"truncate_prompt_tokens": 5}, "truncate_prompt_tokens", "not supported"),
    ],
)
def test_refusals_name_the_field_and_its_value(
    body: dict[str, Any], param: str, words: str
) -> None:
    with pytest.raises(ApiError) as caught:
        parse(**body)
    assert caught.value.status == 400
    assert caught.value.info.param == param
    assert words in str(caught.value)


def test_vectors_of_several_chunks_and_runs() -> None:
    answer = VectorAnswer(tiny_embedders.request("a", "x", "y", "z"))

    def chunk(index: int, *values: float) -> Vectors:
        return Vectors("a", 1, index, 1, struct.pack(f"<{len(values)}f", *values))

    answer.add(chunk(1, 1.0, 2.0))
    assert answer.num_missing == 1
    for strange in (chunk(3, 9.0), chunk(2, 9.0, 9.0), chunk(-1, 9.0)):
        answer.add(strange)
    answer.add(Vectors("a", 1, 0, 0, b""))
    answer.add(chunk(0, 5.0, 6.0))  # of another run
    assert answer.num_missing == 0
    assert b"".join(answer.whole()) == struct.pack("<3f", 5.0, 6.0, 2.0)


def facts(runner: Runner, dimensions: int) -> ModelFacts:
    return ModelFacts("x", "float32", 1, 1, 1, 512, 8, runner, dimensions)


def test_a_model_is_known_by_what_it_is_for(catalog: Any) -> None:
    def deploy(name: str, found: ModelFacts | None, runner: Any = "auto") -> None:
        spec = ModelSpec(name=name, source="/m", runner=runner)
        record = DeploymentRecord(spec=spec, status="ready", facts=found)
        catalog._deployments.values[name] = record

    deploy("writes", facts("generate", 0))
    deploy("embeds", facts("embed", 64))
    deploy("new", None)
    deploy("told", None, "embed")
    catalog.require("writes")
    catalog.require("embeds", "embed", 64)
    catalog.require("new")
    catalog.require("new", "embed", 10_000)
    catalog.require("told", "embed")
    for model, runner in (("writes", "embed"), ("embeds", "generate"), ("told", "generate")):
        with pytest.raises(ApiError, match=model) as caught:
            catalog.require(model, runner)
        assert (caught.value.status, caught.value.info.code) == (400, "model_not_supported")
        assert caught.value.info.param == "model"
    with pytest.raises(ApiError, match="dimensions = 65: vectors of model 'embeds' have 64"):
        catalog.require("embeds", "embed", 65)
