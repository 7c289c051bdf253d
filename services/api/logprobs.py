"""Log probabilities in OpenAI's two forms: of a chat's answer, and of a text's.

One entry for each generated token, the one that ended the answer included; so where an
end-of-sequence token or a stop string ended it, the tokens say more than its text does.
"""

from collections.abc import Sequence

from schemas.stream import TokenLogprob, TokenLogprobs
from services.api import openai


def of_chat(tokens: Sequence[TokenLogprobs], as_ids: bool = False) -> openai.ChatLogprobs | None:
    """As in ``choices[].logprobs`` of chat completions; None where there are none.

    ``as_ids``: tokens are called "token_id:ID", for those whose text does not tell them apart.
    """
    if not tokens:
        return None
    return openai.ChatLogprobs(
        [
            openai.ChatLogprob(
                *_named(token.chosen, as_ids),
                [openai.TopLogprob(*_named(other, as_ids)) for other in token.top],
            )
            for token in tokens
        ]
    )


def of_text(tokens: Sequence[TokenLogprobs], as_ids: bool = False) -> openai.TextLogprobs | None:
    """As in ``choices[].logprobs`` of completions; None where there are none."""
    if not tokens:
        return None
    return openai.TextLogprobs(
        text_offset=[token.offset for token in tokens],
        token_logprobs=[token.chosen.logprob for token in tokens],
        tokens=[_name(token.chosen, as_ids) for token in tokens],
        top_logprobs=[_top(token, as_ids) for token in tokens],
    )


def _top(token: TokenLogprobs, as_ids: bool) -> dict[str, float]:
    # Two tokens may have the same text: the likelier one comes first, and stays.
    found: dict[str, float] = {}
    for one in (*token.top, token.chosen):
        found.setdefault(_name(one, as_ids), one.logprob)
    return found


def _name(one: TokenLogprob, as_ids: bool) -> str:
    return f"token_id:{one.token_id}" if as_ids else one.text


def _named(one: TokenLogprob, as_ids: bool) -> tuple[str, float, list[int]]:
    return _name(one, as_ids), one.logprob, list(one.raw or one.text.encode())
