"""A model's tokenizer side: prompts to token ids, and which ids end a completion."""

import functools
import inspect
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from jinja2 import TemplateError
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from schemas.requests import ChatMessage, ChatPrompt, Prompt, TextPrompt, TokenPrompt, Tool
from schemas.state import ToolFormat
from schemas.stream import ErrorCode
from services.gpu_agent.engine.pieces import Pieces
from services.gpu_agent.tool_format import MARKERS, format_of

# What is not a variable of the template, but tells the function that renders it what to do.
_TEMPLATE_ARGUMENTS: Final = frozenset(
    inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters
) - {"kwargs"}


class InvalidPrompt(Exception):
    """The prompt cannot be turned into tokens of this model. The message is for the client."""

    code: ErrorCode = "invalid_prompt"


class NoTools(InvalidPrompt):
    """The model's chat template knows no tools."""

    code = "tools_not_supported"


class BadTokenizer(Exception):
    """The model's tokenizer files are missing or unreadable. The message names the folder."""


class ModelText:
    """One model's tokenizer, its end-of-sequence ids, and its vocabulary size.

    Stays for as long as the model is registered, through all swaps. ``vocab_size`` is the
    number of rows of the embedding: an id at or above it has no embedding.
    """

    def __init__(self, model: str, tokenizer: Any, eos_ids: frozenset[int], vocab_size: int):
        self.model: Final = model
        self.tokenizer: Final = tokenizer
        self.pieces: Final = Pieces(tokenizer)
        self.eos_ids: Final = eos_ids
        self.vocab_size: Final = vocab_size

    @classmethod
    def read(cls, model: str, folder: Path, config: Any, trust_remote_code: bool) -> "ModelText":
        """Load the tokenizer in ``folder``. Never asks the hub. Raises BadTokenizer."""
        try:
            tokenizer = AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=trust_remote_code
            )
        except Exception as error:
            # Whatever goes wrong in there, down to a KeyError in a damaged JSON file, it is
            # these files that must be repaired.
            raise BadTokenizer(
                f"model {model!r}: no usable tokenizer in {folder} "
                f"({type(error).__name__}: {_first_line(error)}): "
                "add tokenizer.json and tokenizer_config.json of this model"
            ) from error
        vocab_size = int(config.get_text_config().vocab_size)
        return cls(model, tokenizer, _eos_ids(folder, config, tokenizer), vocab_size)

    @functools.cached_property
    def tool_format(self) -> ToolFormat:
        """How its chat template writes calls of tools; "": it knows none."""
        try:
            template = self.tokenizer.get_chat_template(tools=[{}])
        except (ValueError, AttributeError):  # it has none
            return ""
        return format_of(template)

    def tokenizer_for(self, prompt: Prompt) -> Any:
        """What decodes a completion of ``prompt``: markers of tool calls are text where tools are
        offered, although many tokenizers have them as special tokens.
        """
        offers = isinstance(prompt, ChatPrompt) and prompt.tools
        return self._shows_markers if offers else self.tokenizer

    @functools.cached_property
    def _shows_markers(self) -> Any:
        special = set(self.tokenizer.all_special_ids)
        shown = {i for word in MARKERS if (i := self.tokenizer.get_vocab().get(word)) in special}
        return _ShowsMarkers(self.tokenizer, special - shown) if shown else self.tokenizer

    def encode(self, prompt: Prompt) -> list[int]:
        """``prompt`` as token ids that the model can take, at least one. Raises InvalidPrompt."""
        ids = self.tokens_of(prompt)
        if not ids:
            raise InvalidPrompt("the prompt is empty: it has no tokens")
        self.check(ids)
        return ids

    def check(self, ids: Sequence[int]) -> None:
        """Raise InvalidPrompt where one of ``ids`` is none of the model's."""
        wrong = next((i for i in ids if not 0 <= i < self.vocab_size), None)
        if wrong is not None:
            raise InvalidPrompt(
                f"token id {wrong} is outside the vocabulary of model {self.model!r}, "
                f"which has ids 0 to {self.vocab_size - 1}"
            )

    def tokens_of(self, prompt: Prompt) -> list[int]:
        """``prompt`` as token ids, as the tokenizer says. Raises InvalidPrompt."""
        match prompt:
            case ChatPrompt():
                return self._encode_chat(prompt)
            case TextPrompt(text, add_special_tokens):
                return list(self.tokenizer.encode(text, add_special_tokens=add_special_tokens))
            case TokenPrompt():
                return list(prompt.token_ids)

    def _encode_chat(self, prompt: ChatPrompt) -> list[int]:
        if not prompt.messages:
            raise InvalidPrompt("the chat has no messages")
        if not getattr(self.tokenizer, "chat_template", None):
            raise InvalidPrompt(
                f"model {self.model!r} has no chat template: use the completions endpoint, "
                "or add chat_template.jinja to the model's folder"
            )
        if prompt.tools and not self.tool_format:
            raise NoTools(
                f"the chat template of model {self.model!r} does not know tools: leave them "
                "out, or use another model"
            )
        messages = [_as_dict(message) for message in prompt.messages]
        tools = [_tool_as_dict(tool) for tool in prompt.tools]
        try:
            text = self.tokenizer.apply_chat_template(
                messages,
                tools=tools or None,
                tokenize=False,
                add_generation_prompt=prompt.add_generation_prompt,
                continue_final_message=prompt.continue_final_message,
                **self._template_variables(prompt),
            )
        except (TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
            # Templates refuse by raise_exception(...), for example a role they do not know.
            raise InvalidPrompt(
                f"the chat template of model {self.model!r} refused the messages: "
                f"{_first_line(error)}"
            ) from error
        # The template writes the special tokens itself; a second BOS would change the answer.
        return list(self.tokenizer.encode(text, add_special_tokens=prompt.add_special_tokens))

    def _template_variables(self, prompt: ChatPrompt) -> dict[str, Any]:
        """What the template gets besides the messages. Raises InvalidPrompt for what it would
        not look at though the request asks for it by name.
        """
        variables = dict(prompt.template_kwargs)
        for name in variables:
            if name in _TEMPLATE_ARGUMENTS:
                raise InvalidPrompt(f"chat_template_kwargs can not have {name!r}")
        if prompt.documents:
            self._require_variable("documents")
            variables["documents"] = list(prompt.documents)
        if effort := prompt.reasoning_effort:
            if effort != "none":  # a model that does not reason does as it is told
                self._require_variable("reasoning_effort", "enable_thinking")
            variables.setdefault("reasoning_effort", effort)
            variables.setdefault("enable_thinking", effort != "none")
        return variables

    def _require_variable(self, name: str, *others: str) -> None:
        known = "|".join((name, *others))
        if not re.search(rf"\b({known})\b", self.tokenizer.get_chat_template()):
            raise InvalidPrompt(
                f"the chat template of model {self.model!r} does not know {name}: leave it out"
            )

    def bad_words(self, words: Sequence[str]) -> list[list[int]]:
        """The token sequences that say ``words``: at the beginning of a text, and after a space.

        The second only where it is one word's other spelling, not a space and the first again.
        """
        found: list[list[int]] = []
        for word in words:
            bare, spaced = (
                list(self.tokenizer.encode(prefix + word.lstrip(), add_special_tokens=False))
                for prefix in ("", " ")
            )
            if not bare:
                raise InvalidPrompt(f"bad_words: {word!r} has no tokens")
            found.append(bare)
            if len(spaced) == len(bare) and spaced[0] != bare[0]:
                found.append(spaced)
        return found

    def decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str:
        """The text of ``ids``, just as it is."""
        return str(
            self.tokenizer.decode(
                list(ids),
                skip_special_tokens=skip_special_tokens,
                clean_up_tokenization_spaces=False,
            )
        )


class _ShowsMarkers:
    """A tokenizer's decoder that drops the special tokens in ``hidden`` only."""

    def __init__(self, tokenizer: Any, hidden: set[int]) -> None:
        self._tokenizer = tokenizer
        self._hidden = hidden

    def decode(self, ids: list[int], skip_special_tokens: bool = True, **options: Any) -> str:
        if skip_special_tokens:
            ids = [token_id for token_id in ids if token_id not in self._hidden]
        return str(self._tokenizer.decode(ids, skip_special_tokens=False, **options))


def _as_dict(message: ChatMessage) -> dict[str, Any]:
    """As chat templates take messages: like OpenAI's, but for arguments, which are no text."""
    found: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.name is not None:
        found["name"] = message.name
    if message.tool_call_id is not None:
        found["tool_call_id"] = message.tool_call_id
    if message.tool_calls:
        found["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.name, "arguments": json.loads(call.arguments)},
            }
            for call in message.tool_calls
        ]
    return found


def _tool_as_dict(tool: Tool) -> dict[str, Any]:
    function: dict[str, Any] = {"name": tool.name, "description": tool.description}
    function["parameters"] = tool.parameters or {"type": "object", "properties": {}}
    return {"type": "function", "function": function}


def _eos_ids(folder: Path, config: Any, tokenizer: Any) -> frozenset[int]:
    """All ids that end a completion: chat models often have a second one beside the first."""
    found: list[Any] = [config.get_text_config().eos_token_id, tokenizer.eos_token_id]
    if (folder / "generation_config.json").is_file():
        try:
            generation = GenerationConfig.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError) as error:
            raise BadTokenizer(
                f"{folder / 'generation_config.json'} cannot be read: {_first_line(error)}"
            ) from error
        # It is the more specific word: what config.json says is often the base model's.
        found = [generation.eos_token_id or found[0], tokenizer.eos_token_id]
    flat: set[int] = set()
    for value in found:
        if isinstance(value, int):
            flat.add(value)
        elif value is not None and not isinstance(value, Mapping):
            flat.update(int(i) for i in value)
    return frozenset(flat)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
