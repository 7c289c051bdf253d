"""Three small models for demonstrations and tests, made on the spot from a fixed seed.

They are real checkpoints (config.json, model.safetensors, tokenizer.json, chat template),
of three architectures, and what they say is noise: nothing is trained but the tokenizer.

Most of the bytes are vocabulary (embedding and an untied head), few are in layers. A swap
costs bytes and a prompt costs layers, so a model like that moves as much memory as a real
one of its size, while a long prompt stays quick on two CPU cores.
"""

import json
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    FalconConfig,
    GenerationConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
)

from services.demo.text import ENGLISH

FORMAT_VERSION: Final = 4  # raise it when anything below changes what is written
MARKER: Final = "hotswap-demo.json"

VOCAB_SIZE: Final = 32768
BOS, EOS, PAD, TURN = "<|bos|>", "<|im_end|>", "<|pad|>", "<|im_start|>"
SPECIAL_TOKENS: Final = (PAD, BOS, TURN, EOS)  # ids 0, 1, 2, 3

# Tools and calls are written as Hermes and Qwen models do.
CHAT_TEMPLATE: Final = (
    "{{ bos_token }}"
    "{% if tools %}"
    "{{ '<|im_start|>system\\nYou can call these functions:\\n<tools>\\n' }}"
    "{% for tool in tools %}{{ tool | tojson + '\\n' }}{% endfor %}"
    "{{ '</tools>\\nTo call one, write its name and arguments as JSON:\\n<tool_call>\\n' }}"
    '{{ \'{"name": ..., "arguments": {...}}\\n</tool_call><|im_end|>\\n\' }}'
    "{% endif %}"
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] }}"
    "{% for call in message['tool_calls'] or [] %}"
    "{{ '\\n<tool_call>\\n{\"name\": ' + call['function']['name'] | tojson }}"
    "{{ ', \"arguments\": ' + call['function']['arguments'] | tojson + '}\\n</tool_call>' }}"
    "{% endfor %}"
    "{{ '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

Progress = Callable[[str, int, int], None]  # (what is being done, steps done, steps in all)


@dataclass(frozen=True)
class DemoModel:
    """One model to make: ``config`` is a transformers configuration."""

    name: str
    seed: int
    config: Any


def demo_configs() -> list[DemoModel]:
    """The three models, smallest first: about 190, 217 and 256 MB in float32."""
    common = {
        "vocab_size": VOCAB_SIZE,
        "max_position_embeddings": 4096,
        "pad_token_id": SPECIAL_TOKENS.index(PAD),
        "bos_token_id": SPECIAL_TOKENS.index(BOS),
        "eos_token_id": SPECIAL_TOKENS.index(EOS),
        "tie_word_embeddings": False,
        "dtype": "float32",
    }
    falcon = FalconConfig(
        hidden_size=672,
        num_hidden_layers=2,
        num_attention_heads=4,
        multi_query=True,
        parallel_attn=True,
        alibi=False,
        bias=False,
        ffn_hidden_size=384,
        architectures=["FalconForCausalLM"],
        **common,
    )
    llama = LlamaConfig(
        hidden_size=768,
        intermediate_size=640,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=64,
        architectures=["LlamaForCausalLM"],
        **common,
    )
    mistral = MistralConfig(
        hidden_size=896,
        intermediate_size=640,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=64,
        sliding_window=1024,
        architectures=["MistralForCausalLM"],
        **common,
    )
    return [
        DemoModel("falcon", 11, falcon),
        DemoModel("llama", 12, llama),
        DemoModel("mistral", 13, mistral),
    ]


def make_demo_models(folder: Path, on_progress: Progress | None = None) -> list[Path]:
    """Make the demo models under ``folder``, and give their folders, smallest model first.

    A model that is there, complete and of this format version is left alone. Each model is
    written beside its place and renamed into it, so there is never half a model.

    Raises OSError where ``folder`` cannot be written (no space, no permission).
    """
    report = on_progress or (lambda what, done, total: None)
    wanted = demo_configs()
    missing = [model for model in wanted if not is_complete(folder / model.name)]
    total = len(missing) + 1
    if missing:
        folder.mkdir(parents=True, exist_ok=True)
        report("training the tokenizer", 0, total)
        tokenizer = train_tokenizer()
        for done, model in enumerate(missing, start=1):
            report(f"writing model {model.name}", done, total)
            _write_model(folder, model, tokenizer)
    report("demo models are ready", total, total)
    return [folder / model.name for model in wanted]


def is_complete(folder: Path) -> bool:
    """Whether ``folder`` holds a finished demo model of this format version, no file cut."""
    try:
        marker = json.loads((folder / MARKER).read_bytes())
        return bool(marker["format_version"] == FORMAT_VERSION) and all(
            (folder / name).stat().st_size == size for name, size in marker["files"].items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _write_model(folder: Path, model: DemoModel, tokenizer: PreTrainedTokenizerFast) -> None:
    """Write one model into a hidden folder next to its place, then rename it."""
    building = Path(tempfile.mkdtemp(prefix=f".{model.name}-", dir=folder))
    try:
        tokenizer.save_pretrained(building)
        model.config.save_pretrained(building)
        GenerationConfig(
            bos_token_id=model.config.bos_token_id,
            eos_token_id=model.config.eos_token_id,
            pad_token_id=model.config.pad_token_id,
        ).save_pretrained(building)
        weights = make_weights(model, quiet_ids=_quiet_ids(tokenizer))
        save_file(weights, building / "model.safetensors", metadata={"format": "pt"})
        files = {path.name: path.stat().st_size for path in sorted(building.iterdir())}
        marker = {"format_version": FORMAT_VERSION, "seed": model.seed, "files": files}
        (building / MARKER).write_text(json.dumps(marker, indent=1) + "\n")
        building.chmod(0o755)  # mkdtemp gives 0700 and safetensors 0600:
        (building / "model.safetensors").chmod(0o644)  # a service user could not read those
        final = folder / model.name
        if final.exists():
            shutil.rmtree(final)
        building.rename(final)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def make_weights(model: DemoModel, quiet_ids: list[int]) -> dict[str, torch.Tensor]:
    """Seeded weights by parameter name.

    Embeddings are small beside what the layers add, so that the next token depends on the
    whole context; with large embeddings the model would map each token to one fixed next
    token, and greedy decoding would soon go round in a circle. The head's rows for
    ``quiet_ids`` are zero: greedy decoding never chooses those.
    """
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(model.config)
    generator = torch.Generator().manual_seed(model.seed)
    weights: dict[str, torch.Tensor] = {}
    for name, like in skeleton.state_dict().items():
        tensor = torch.empty(like.shape, dtype=torch.float32)
        if like.dim() == 1:  # norms: scale 1, shift 0
            tensor.fill_(0.0 if name.endswith("bias") else 1.0)
        elif "embed" in name:
            tensor.normal_(0.0, 0.3, generator=generator)
        elif name == "lm_head.weight":
            tensor.normal_(0.0, 0.1, generator=generator)
            tensor[quiet_ids] = 0.0
        else:  # keeps the variance of what goes through, a little amplified
            tensor.normal_(0.0, 1.5 * like.shape[1] ** -0.5, generator=generator)
        weights[name] = tensor
    return weights


def _quiet_ids(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Special tokens, and those of single bytes that are no character by themselves."""
    return [
        index
        for index in range(VOCAB_SIZE)
        if index < len(SPECIAL_TOKENS) or "�" in tokenizer.decode([index])
    ]


# -- tokenizer ---------------------------------------------------------------------------


def train_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of exactly ``VOCAB_SIZE`` tokens, the same on every run.

    Trained on the English of `services.demo.text` and on pseudo-words with a Zipf
    distribution: enough different words for that many merges.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        min_frequency=1,
        special_tokens=[AddedToken(token, special=True) for token in SPECIAL_TOKENS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(_corpus(), trainer)
    if bpe.get_vocab_size() != VOCAB_SIZE:
        raise RuntimeError(
            f"the tokenizer has {bpe.get_vocab_size()} tokens instead of {VOCAB_SIZE}: "
            "the training text has too few different words"
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        additional_special_tokens=[TURN],
        chat_template=CHAT_TEMPLATE,
        model_max_length=4096,
        clean_up_tokenization_spaces=False,
    )


ONSETS: Final = "b c d f g h j k l m n p r s t v w z br cl dr fl gr pl pr sh st th tr"
VOWELS: Final = "a e i o u ai ea ee oo ou"


def _corpus() -> Iterator[str]:
    """Training text: the sentences often, then pseudo-words by rank, common ones often."""
    yield from [ENGLISH] * 200
    rng = random.Random(7)
    codas = ["", "", "", "l", "m", "n", "r", "s", "t", "nd", "st", "ck"]
    syllables = [o + v + c for o in ONSETS.split() for v in VOWELS.split() for c in codas]
    words: dict[str, None] = {}
    while len(words) < 40_000:
        words["".join(rng.choices(syllables, k=rng.choice((1, 2, 2, 3))))] = None
    for rank, word in enumerate(words, start=1):
        yield f" {word}" * max(1, 4000 // rank)


def prompt_of(tokenizer: Any, num_tokens: int, seed: int = 0) -> str:
    """English-looking text that ``tokenizer.encode`` turns into exactly ``num_tokens`` ids.

    ``seed`` chooses the words, so that different prompts share no beginning. Raises
    ValueError where the tokenizer allows no such text (``num_tokens`` below 1, or fewer
    than the tokens it adds by itself).
    """
    rng = random.Random(seed)
    words = sorted({word for word in ENGLISH.split() if word.isalpha() and word.islower()})
    chosen = rng.choices(words, k=max(num_tokens, 1))

    def count(text: str) -> int:
        return len(tokenizer.encode(text))

    # A word is at least one token, so the longest prefix of `chosen` that fits is found
    # by bisection; what is then still missing is filled with the shortest pieces.
    low, high = 0, len(chosen)
    while low < high:
        middle = (low + high + 1) // 2
        if count(" ".join(chosen[:middle])) <= num_tokens:
            low = middle
        else:
            high = middle - 1
    text = " ".join(chosen[:low])
    for _ in range(64):
        have = count(text)
        if have == num_tokens and text:
            return text
        text += next((piece for piece in (" a", " the", ".") if count(text + piece) > have), " a")
    raise ValueError(
        f"no text of exactly {num_tokens} tokens found for this tokenizer "
        f"(nearest has {count(text)})"
    )
