"""The text and bytes of single tokens: spaces kept, characters in parts, special tokens named."""

from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from services.gpu_agent.engine.pieces import Pieces
from tests.unit.engine_kit import byte_tokenizer


def sentencepiece_like() -> Any:
    """As Llama 2: words with U+2581 for a space, and bytes for what has no word."""
    words = ["<unk>", "</s>", "\u2581", "\u2581a", "a", "\u2581time", "<0xE2>", "<0x9D>"]
    bpe = Tokenizer(
        models.BPE(
            {word: i for i, word in enumerate(words)}, [], unk_token="<unk>", byte_fallback=True
        )
    )
    bpe.pre_tokenizer = pre_tokenizers.Metaspace()
    bpe.decoder = decoders.Sequence(
        [decoders.Metaspace(), decoders.ByteFallback(), decoders.Fuse()]
    )
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="</s>", unk_token="<unk>")


def test_bytes_of_a_character_put_it_together() -> None:
    tokenizer = byte_tokenizer()
    pieces = Pieces(tokenizer)
    found = [pieces.of(token_id) for token_id in tokenizer.encode("e é❤")]
    assert found[:2] == [("e", b""), (" ", b"")]
    assert [text for text, _ in found[2:4]] == ["\\xc3", "\\xa9"]
    assert b"".join(raw or text.encode() for text, raw in found) == "e é❤".encode()


@pytest.mark.parametrize(
    ("name", "piece"),
    [
        ("\u2581time", (" time", b"")),
        ("a", ("a", b"")),
        ("</s>", ("</s>", b"")),
        ("<0xE2>", ("\\xe2", b"\xe2")),
    ],
)
def test_words_and_byte_fallback(name: str, piece: tuple[str, bytes]) -> None:
    tokenizer = sentencepiece_like()
    assert Pieces(tokenizer).of(tokenizer.convert_tokens_to_ids(name)) == piece


def test_an_id_that_the_tokenizer_does_not_have_is_empty() -> None:
    """Embeddings may have more rows than the vocabulary has words."""
    assert Pieces(byte_tokenizer()).of(999) == ("", b"")


def test_each_token_is_decoded_once() -> None:
    tokenizer = byte_tokenizer()
    pieces = Pieces(tokenizer)
    assert pieces.of(3) == pieces.of(3)
    assert pieces.of.cache_info().hits == 1
