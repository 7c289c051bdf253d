"""Grammars: which tokens may come next, so that a completion is what the request asks for.

    Grammar ──(a thread)──> matcher ──> Constraint: mask, count, mask, count ... is_over

llguidance does the work: a grammar and a model's vocabulary become a matcher, which for each next
token tells one bit per entry of the vocabulary. A matcher for a large schema takes up to some
hundred milliseconds to build, and with the first grammar of a model its vocabulary is read; so a
thread does it, and the request waits while others compute. Special tokens are never allowed,
apart from those that end a completion, which are where the grammar may end.

A constraint is a function of the tokens that it was told. It stays with its row when the row is
parked, and a run that begins anew gets a new one.
"""

import functools
import json
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Final

import llguidance
import llguidance.numpy
import numpy as np
import torch
from llguidance.gbnf_to_lark import any_to_lark
from tokenizers import Tokenizer

from schemas.requests import MAX_GRAMMAR_CHARS, MAX_SCHEMA_CHARS, Grammar, Tool
from schemas.state import ToolFormat
from services.gpu_agent.engine.prompts import InvalidPrompt
from services.gpu_agent.engine.tool_grammar import JSON_OPTIONS, lark_string, tool_grammar

_LISTING: Final = re.compile(r"\n *\d+ \|.*", re.DOTALL)  # lines of source, with their numbers
_CACHED: Final = 32  # matchers, before their first token
_MAX_CHARS: Final = 400
# llguidance wants an end, and a model may have none: this comes after its tokens.
_NO_END: Final = "<|no end|>"


class InvalidGrammar(InvalidPrompt):
    """The request's grammar is not one, or takes too much. The message is for the client."""

    code = "invalid_grammar"


class Constraint:
    """One request's place in its grammar.

    ``matcher``: a future of it. ``num_tokens``: bits that it tells. ``has_end``: whether any token
    ends a completion of this model. Tokens may be counted before the matcher is there.
    """

    def __init__(self, matcher: "Future[Any]", num_tokens: int, has_end: bool) -> None:
        self._future = matcher
        self._num_tokens = num_tokens
        self._has_end = has_end
        self._matcher: Any = None
        self._counted: list[int] = []  # before the matcher was there
        self._allowed: torch.Tensor | None = None  # bool (num_tokens and a little more,)

    @property
    def is_ready(self) -> bool:
        """Whether it can be used, or never will be: `begin` tells."""
        return self._future.done()

    @property
    def has_begun(self) -> bool:
        return self._matcher is not None

    def begin(self) -> None:
        """To be called once it is ready. Raises InvalidGrammar."""
        if self._matcher is None:
            self._matcher = self._future.result()
            for token_id in self._counted:
                self._matcher.consume_token(token_id)
            self._counted.clear()

    def prepare(self) -> None:
        """Find out what may come next. Apart from `apply`, to be done while a GPU computes."""
        if self._allowed is None:
            self.begin()
            bits = llguidance.numpy.allocate_token_bitmask(1, self._num_tokens)
            llguidance.numpy.fill_next_token_bitmask(self._matcher, bits)
            each = np.unpackbits(bits[0].view(np.uint8), bitorder="little")
            self._allowed = torch.from_numpy(each).view(torch.bool)

    def apply(self, scores: torch.Tensor) -> torch.Tensor:
        """``scores`` (1, vocabulary) with -inf for what may not come next."""
        self.prepare()
        assert self._allowed is not None
        allowed = self._allowed[: scores.shape[-1]]
        if (short := scores.shape[-1] - len(allowed)) > 0:  # rows beyond the tokenizer's
            allowed = torch.nn.functional.pad(allowed, (0, short))
        return scores.masked_fill(~allowed, -torch.inf)

    def count(self, token_id: int) -> None:
        """``token_id`` was chosen."""
        self._allowed = None
        if self._matcher is None:
            self._counted.append(token_id)
        else:
            self._matcher.consume_token(token_id)

    @property
    def error(self) -> str:
        """Why it can not go on, for the client; "" where it can."""
        return _words(self._matcher.get_error()) if self._matcher is not None else ""

    @property
    def is_over(self) -> bool:
        """Whether the completion is whole, and nothing may be added but an end."""
        matcher = self._matcher
        if matcher is None or matcher.is_error():
            return False
        if matcher.is_stopped():
            return True
        if self._has_end or not matcher.is_accepting():
            return False
        self.prepare()  # nothing ends a completion of this model: it ends where no token may come
        assert self._allowed is not None
        return int(self._allowed.sum()) <= 1  # _NO_END itself


class Grammars:
    """Those of one model. ``vocab_size``: rows of its embedding; ``end_ids``: end a completion."""

    def __init__(
        self, tokenizer: Any, end_ids: frozenset[int], vocab_size: int, tool_format: ToolFormat
    ) -> None:
        self._tokenizer = tokenizer
        self._end_ids = sorted(end_ids)
        self._vocab_size = vocab_size
        self._tool_format: ToolFormat = tool_format
        self._vocabulary: Any = None
        self._known: OrderedDict[str, Any] = OrderedDict()  # matchers before their first token
        self._lock = threading.Lock()
        self._thread: ThreadPoolExecutor | None = None

    @functools.cached_property
    def _num_tokens(self) -> int:
        return max(self._vocab_size, len(self._tokenizer)) + 1

    def open(
        self, grammar: Grammar, tools: Sequence[Tool], on_ready: Callable[[], None]
    ) -> Constraint:
        """A new constraint. ``on_ready`` is called in some thread, or at once."""
        key = repr((grammar.kind, grammar.text, tools if "tool" in grammar.kind else ()))
        future: Future[Any] = Future()
        if known := self._known_matcher(key):
            future.set_result(known)
        else:
            if self._thread is None:
                self._thread = ThreadPoolExecutor(1, "grammar")
            future = self._thread.submit(self._build, key, grammar, tools)
        future.add_done_callback(lambda _: on_ready())
        return Constraint(future, self._num_tokens, bool(self._end_ids))

    def _known_matcher(self, key: str) -> Any:
        with self._lock:
            found = self._known.get(key)
            if found is None:
                return None
            self._known.move_to_end(key)
            return found.deep_copy()

    def _build(self, key: str, grammar: Grammar, tools: Sequence[Tool]) -> Any:
        """In the thread. Raises InvalidGrammar."""
        if known := self._known_matcher(key):
            return known
        limits = llguidance.LLParserLimits(verbose_errors=False)
        try:
            if self._vocabulary is None:
                self._vocabulary = self._read_vocabulary()
            text = self._grammar_text(grammar, tools)
            limit = MAX_GRAMMAR_CHARS if grammar.kind in ("regex", "grammar") else MAX_SCHEMA_CHARS
            if len(text) > 2 * limit:  # the api's limit is for what the client sent
                raise InvalidGrammar(f"{grammar.field} is too long: {len(text)} characters")
            matcher = llguidance.LLMatcher(self._vocabulary, text, log_level=0, limits=limits)
            error = matcher.get_error()
        except InvalidGrammar:
            raise
        except Exception as problem:  # whatever a client's text makes the library do
            error = str(problem) or type(problem).__name__
        if error:
            raise InvalidGrammar(f"{grammar.field} can not be followed: {_words(error)}")
        with self._lock:
            self._known[key] = matcher
            if len(self._known) > _CACHED:
                self._known.popitem(last=False)
            return matcher.deep_copy()

    def _read_vocabulary(self) -> Any:
        try:
            backend = Tokenizer.from_str(self._tokenizer.backend_tokenizer.to_str())
            backend.no_padding()
            backend.no_truncation()
            ends = self._end_ids
            if not ends:
                ends = [backend.get_vocab_size()]
                backend.add_special_tokens([_NO_END])
            return llguidance.LLTokenizer(
                backend.to_str(), n_vocab=self._num_tokens, eos_token=ends
            )
        except Exception as error:
            words = f"this model's tokenizer can not be used with a grammar: {error}"
            raise InvalidGrammar(_words(words)) from error

    def _grammar_text(self, grammar: Grammar, tools: Sequence[Tool]) -> str:
        matcher = llguidance.LLMatcher
        match grammar.kind:
            case "json_object":
                return str(
                    matcher.grammar_from_json_schema('{"type": "object"}', None, JSON_OPTIONS)
                )
            case "json_schema":
                return str(matcher.grammar_from_json_schema(grammar.text, None, JSON_OPTIONS))
            case "regex":
                return str(matcher.grammar_from_regex(grammar.text))
            case "choice":
                options = (lark_string(one) for one in json.loads(grammar.text))
                return str(matcher.grammar_from_lark("start: " + " | ".join(options)))
            case "grammar":
                return str(matcher.grammar_from_lark(any_to_lark(grammar.text)))
            case "tool_call" | "tool_calls" | "text_or_tool_calls":
                names = set(json.loads(grammar.text))
                wanted = [tool for tool in tools if tool.name in names]
                form = self._tool_format
                return tool_grammar(grammar.kind, wanted, form, self._tokenizer)


def _words(text: str) -> str:
    """An error of the library, on one line and not too long; without the grammar's text."""
    text = " ".join(_LISTING.sub("", text).split())
    return text if len(text) <= _MAX_CHARS else f"{text[:_MAX_CHARS]}..."
