"""Texts to token ids and back for whoever asks: beside the engine's loop, not in it.

In a thread of its own, with tokenizers of its own: a long text takes long, and one tokenizer is
not to be used by two threads at once.
"""

import logging
from collections import OrderedDict
from typing import Final

from schemas.tokenize import (
    Detokenized,
    DetokenizeRequest,
    TokenizeAnswer,
    TokenizeAsk,
    Tokenized,
    TokenizeFailed,
    TokenizeRequest,
)
from services.gpu_agent.engine.prompts import BadTokenizer, InvalidPrompt, ModelText
from services.gpu_agent.hosted import HostedModel

logger = logging.getLogger(__name__)

MAX_TOKENIZERS: Final = 16  # those used last are kept


class TokenizerDesk:
    """Answers one question after the other. For one thread."""

    def __init__(self) -> None:
        # By model, with what it was read from: a model that was registered anew is another one.
        self._texts: OrderedDict[str, tuple[HostedModel, ModelText]] = OrderedDict()

    def answer(self, hosted: HostedModel, ask: TokenizeAsk) -> TokenizeAnswer:
        """Never raises."""
        try:
            text = self._text_of(hosted)
            match ask:
                case TokenizeRequest(_, prompt, token_strs):
                    ids = text.tokens_of(prompt)
                    strs = text.tokenizer.convert_ids_to_tokens(ids) if token_strs else ()
                    return Tokenized(tuple(ids), hosted.facts.max_model_len, tuple(strs))
                case DetokenizeRequest(_, token_ids):
                    text.check(token_ids)
                    return Detokenized(text.decode(token_ids, skip_special_tokens=False))
        except InvalidPrompt as error:
            return TokenizeFailed("invalid_prompt", str(error))
        except BadTokenizer as error:
            return TokenizeFailed("model_unavailable", str(error))
        except Exception as error:  # whatever a tokenizer does, only its own question may suffer
            logger.exception("model %s: tokenizing failed", hosted.spec.name)
            words = f"the tokenizer of model {hosted.spec.name!r} failed: "
            return TokenizeFailed("engine_failed", f"{words}{type(error).__name__}: {error}")

    def _text_of(self, hosted: HostedModel) -> ModelText:
        """Read at first use. Raises BadTokenizer."""
        spec = hosted.spec
        known = self._texts.pop(spec.name, None)
        if known is None or known[0] is not hosted:
            text = ModelText.read(spec.name, hosted.folder, hosted.config, spec.trust_remote_code)
            known = hosted, text
        self._texts[spec.name] = known
        if len(self._texts) > MAX_TOKENIZERS:
            self._texts.popitem(last=False)
        return known[1]
