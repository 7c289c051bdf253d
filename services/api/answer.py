"""The answer to one request, put together from the chunks of one or more runs of it.

A request may be run more than once: its agent died, or the NATS server lost the queue. A later
run begins behind what is known here, or, where nobody could ask, at token 0 with the same seed. All
runs say the same, and what the client already has is skipped:

    run 1   t0 t1 t2 t3 |            "Once upon"
    run 2                t4 t5                   " a time"
    run 2'  t0 t1 t2 t3 t4 t5        "Once upon" " a time"
                        `---'                    `-------' new: goes to the client

Token ids and text are both compared over the part that is known. The text known at a token
index is a function of the tokens before it, so the places where chunks met (``_char_at``) are
valid for every run.
"""

import msgspec

from schemas.stream import Finished, PromptTold, TokenLogprobs, Tokens


class Piece(msgspec.Struct, frozen=True):
    """What the client gets of one chunk. ``logprobs``: one per new token, where it asks."""

    text: str
    logprobs: tuple[TokenLogprobs, ...] = ()
    token_ids: tuple[int, ...] = ()  # the new ones


class Diverged(Exception):
    """A later run gave other tokens than those that are already at the client."""


class Answer:
    """Pure bookkeeping: chunks in, what is new in them out."""

    def __init__(self) -> None:
        self.token_ids: list[int] = []
        self.prompt: PromptTold | None = None  # comes with the first token
        self._pieces: list[str] = []
        self._num_chars = 0
        self._char_at = {0: 0}  # token index -> characters known before that token
        self._attempts: dict[str, int] = {}  # run -> its newest attempt

    def is_stale(self, run: str, attempt: int) -> bool:
        """Whether ``run`` has been delivered to an agent again since ``attempt``."""
        newest = self._attempts.get(run, 0)
        if attempt > newest:
            self._attempts[run] = attempt
        return attempt < newest

    def num_attempts(self, run: str) -> int:
        """The newest one that was heard of; 0: none."""
        return self._attempts.get(run, 0)

    def add(self, chunk: Tokens) -> Piece | None:
        """What ``chunk`` adds; None where it adds nothing. Raises Diverged.

        A chunk that begins beyond what is known (one before it was lost) adds nothing: a
        later run, or `missing` at the end, makes up for it.
        """
        self.prompt = chunk.prompt or self.prompt
        index, known = chunk.index, len(self.token_ids)
        start = self._char_at.get(index)
        if index > known or start is None:
            return None
        text = chunk.text
        if index == known and start == self._num_chars and chunk.token_ids:  # nothing is known yet
            self.token_ids.extend(chunk.token_ids)
            self._append(text)
            self._char_at[index + len(chunk.token_ids)] = self._num_chars
            return Piece(text, chunk.logprobs, chunk.token_ids)
        overlap = self.token_ids[index : index + len(chunk.token_ids)]
        if overlap or start < self._num_chars:
            seen = self._text_from(start)[: len(text)]
            if overlap != list(chunk.token_ids[: len(overlap)]) or not text.startswith(seen):
                raise Diverged(
                    f"at token {index} a second run gave other tokens than the first, "
                    f"of which {known} are already sent: the model does not repeat itself"
                )
            text = text[len(seen) :]
        fresh = chunk.token_ids[len(overlap) :]
        self.token_ids.extend(fresh)
        self._append(text)
        self._char_at.setdefault(index + len(chunk.token_ids), start + len(chunk.text))
        if not fresh and not text:
            return None
        return Piece(text, chunk.logprobs[len(overlap) :], tuple(fresh))

    def has_gap_before(self, chunk: Tokens) -> bool:
        """Whether tokens between what is known and ``chunk`` were lost."""
        return chunk.index > len(self.token_ids)

    def missing(self, chunk: Finished) -> int:
        """How many tokens of a finished run never arrived."""
        return max(0, chunk.completion_tokens - len(self.token_ids))

    def finish(self, chunk: Finished) -> str:
        """The text that the end of a run adds: what its detokeniser held back."""
        self._append(chunk.text)
        return chunk.text

    def _append(self, text: str) -> None:
        if text:
            self._pieces.append(text)
            self._num_chars += len(text)

    def _text_from(self, start: int) -> str:
        """The known text from character ``start``; walks back, since replays end near the end."""
        tail: list[str] = []
        at = self._num_chars
        for piece in reversed(self._pieces):
            if at <= start:
                break
            at -= len(piece)
            tail.append(piece)
        return "".join(reversed(tail))[max(0, start - at) :]
