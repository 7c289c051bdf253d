"""Tiny seeded checkpoints of models that embed, and their vectors as transformers gives them."""

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import torch
from transformers import (
    AutoModel,
    BertConfig,
    BertForMaskedLM,
    BertModel,
    DistilBertConfig,
    DistilBertModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    ModernBertConfig,
    ModernBertModel,
    MPNetConfig,
    MPNetModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    RobertaConfig,
    RobertaModel,
    XLMRobertaConfig,
    XLMRobertaForMaskedLM,
)

from schemas.requests import EmbedInput, EmbedRequest
from schemas.state import ModelSpec
from services.gpu_agent.engine.embedding import Embedder
from services.gpu_agent.engine.prompts import ModelText
from services.gpu_agent.hosted import HostedModel
from services.gpu_agent.ipc import Begun, Broke, Done, Embedded, FromWorker
from services.gpu_agent.pages import PagePool
from services.gpu_agent.runner import PoolingMode
from tests.unit.engine_kit import save_tokenizer

WIDTH: Final = 64
MAX_LEN: Final = 128

_COMMON: Final[dict[str, Any]] = {
    "vocab_size": 256,
    "hidden_size": WIDTH,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "max_position_embeddings": MAX_LEN,
}
# Roberta and its kin: the first position is that after the padding's id.
_ROBERTA: Final = {**_COMMON, "max_position_embeddings": MAX_LEN + 2, "pad_token_id": 1}
_LLAMA: Final = {**_COMMON, "num_key_value_heads": 2}

# name -> (class that is stored, config). "auto" embeds all but those that end in _causal.
FAMILIES: Final[dict[str, tuple[Any, Callable[[], Any]]]] = {
    "bert": (BertModel, lambda: BertConfig(**_COMMON)),
    "bert_masked": (BertForMaskedLM, lambda: BertConfig(**_COMMON)),
    "roberta": (RobertaModel, lambda: RobertaConfig(**_ROBERTA)),
    "xlm_roberta_masked": (XLMRobertaForMaskedLM, lambda: XLMRobertaConfig(**_ROBERTA)),
    "mpnet": (MPNetModel, lambda: MPNetConfig(**_ROBERTA)),
    "distilbert": (
        DistilBertModel,
        lambda: DistilBertConfig(
            vocab_size=256,
            dim=WIDTH,
            n_layers=3,
            n_heads=4,
            hidden_dim=96,
            max_position_embeddings=MAX_LEN,
        ),
    ),
    "modernbert": (
        ModernBertModel,
        lambda: ModernBertConfig(
            **_COMMON,
            local_attention=16,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            cls_token_id=1,
            sep_token_id=2,
        ),
    ),
    "llama": (LlamaModel, lambda: LlamaConfig(**_LLAMA)),
    "llama_causal": (LlamaForCausalLM, lambda: LlamaConfig(**_LLAMA)),
    "qwen3_causal": (Qwen3ForCausalLM, lambda: Qwen3Config(**_LLAMA, head_dim=16)),
}


def write(folder: Path, family: str, *, seed: int = 0) -> Path:
    """Write ``family`` with seeded random weights and a byte tokenizer; returns the folder."""
    kind, make_config = FAMILIES[family]
    state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    try:
        model = kind(make_config())
        for parameter in model.parameters():
            if parameter.ndim == 1:  # else ones and zeros, which would hide a mix-up
                parameter.data.add_(torch.randn_like(parameter) * 0.1)
            else:
                parameter.data.mul_(3.0)
    finally:
        torch.random.set_rng_state(state)
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def add_modules(folder: Path, mode: str, *more: str, keys: dict[str, Any] | None = None) -> None:
    """The files of sentence-transformers: a pooling ``mode``, and ``more`` modules after it."""
    kinds = ["Transformer", "Pooling", *more]
    modules = [
        {
            "idx": i,
            "name": str(i),
            "path": "" if i == 0 else f"{i}_{kind}",
            "type": f"sentence_transformers.models.{kind}",
        }
        for i, kind in enumerate(kinds)
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir(exist_ok=True)
    (folder / "1_Pooling" / "config.json").write_text(
        json.dumps(keys or {"word_embedding_dimension": WIDTH, f"pooling_mode_{mode}": True})
    )


def spec(folder: Path, name: str = "tiny", **more: Any) -> ModelSpec:
    return ModelSpec(name, str(folder), runner="embed", **more)


def reference(folder: Path, ids: list[int], mode: PoolingMode, normalized: bool) -> torch.Tensor:
    """The vector (WIDTH,) of one input alone, by hand, over the model as transformers loads it."""
    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        states = model(torch.tensor([ids]), attention_mask=torch.ones((1, len(ids))).long())[0][0]
    places = torch.arange(1, len(ids) + 1)[:, None]
    vector = {
        "cls": lambda: states[0],
        "mean": lambda: states.sum(0) / len(ids),
        "max": lambda: states.max(0).values,
        "lasttoken": lambda: states[-1],
        "weightedmean": lambda: (states * places).sum(0) / places.sum(),
        "mean_sqrt_len": lambda: states.sum(0) / math.sqrt(len(ids)),
    }[mode]()
    found: torch.Tensor = vector / vector.norm() if normalized else vector
    return found


def embedder_of(model: HostedModel, pool: PagePool, **more: Any) -> Embedder:
    """An embedder over ``model``, which may be anywhere now."""
    assert model.pooling is not None
    text = ModelText.read(model.spec.name, model.folder, model.config, False)
    facts = model.facts
    return Embedder(
        model.module,
        model.pooling,
        text,
        facts.dimensions,
        facts.max_model_len,
        pool.torch_device,
        **more,
    )


def request(
    request_id: str,
    *inputs: EmbedInput | list[int],
    model: str = "tiny",
    deadline_at: float = math.inf,
    dimensions: int | None = None,
) -> EmbedRequest:
    return EmbedRequest(
        request_id=request_id,
        model=model,
        klass="interactive",
        inputs=tuple(tuple(one) if isinstance(one, list) else one for one in inputs),
        reply_to="nowhere",
        created_at=0.0,
        deadline_at=deadline_at,
        dimensions=dimensions,
    )


class Collected:
    """What came out, by request; checks that each ends once, with all its vectors before."""

    def __init__(self) -> None:
        self.ends: dict[str, Done | Broke] = {}
        self.begun: list[str] = []
        self._data: dict[str, list[Embedded]] = {}

    def take(self, out: list[FromWorker]) -> None:
        for message in out:
            match message:
                case Begun():
                    self.begun.append(message.request_id)
                case Embedded():
                    assert message.request_id not in self.ends
                    found = self._data.setdefault(message.request_id, [])
                    assert message.index == sum(_num_vectors(one) for one in found)
                    found.append(message)
                case Done() | Broke():
                    assert message.request_id not in self.ends, f"{message} is a second end"
                    self.ends[message.request_id] = message

    def vectors(self, request_id: str) -> torch.Tensor:
        """(inputs, dimensions), float32."""
        chunks = self._data[request_id]
        data = bytearray(b"".join(one.data for one in chunks))
        return torch.frombuffer(data, dtype=torch.float32).view(-1, chunks[0].dimensions)

    def num_chunks(self, request_id: str) -> int:
        return len(self._data.get(request_id, []))


def _num_vectors(chunk: Embedded) -> int:
    return len(chunk.data) // (4 * chunk.dimensions)


def run(embedder: Embedder, *requests: EmbedRequest) -> Collected:
    """Submit all, and step until all have ended."""
    got = Collected()
    for one in requests:
        got.take(embedder.submit(one))
        embedder.validate()
    while embedder.num_requests:
        got.take(embedder.step())
        embedder.validate()
    assert got.ends.keys() == {one.request_id for one in requests}
    return got


def some_ids(*lengths: int) -> Iterator[list[int]]:
    """Seeded ids from 3 on: below that are paddings of these families."""
    generator = torch.Generator().manual_seed(len(lengths))
    for length in lengths:
        yield torch.randint(3, 256, (length,), generator=generator).tolist()
