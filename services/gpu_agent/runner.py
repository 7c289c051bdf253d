"""What a model is for, as its files tell: to generate text, or to embed it, and how.

1. ``runner`` of the spec, where it is not "auto"
2. files of sentence-transformers beside the weights: it embeds
3. a causal language model among config.json's architectures, or none at all: it generates
4. anything else (BertModel, XLMRobertaForMaskedLM, MistralModel ...): it embeds

How it embeds is said by the files of sentence-transformers, where there are any:

    modules.json           [Transformer, Pooling, Normalize?]
    1_Pooling/config.json  which of the last hidden states become the vector

Without them encoders take the mean over all tokens and decoders the last token's state, and
vectors have length 1. Prompts (config_sentence_transformers.json) are not put before inputs: no
request says whether it is a query or a document, so clients put them there.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias

from schemas.state import ModelSpec
from services.gpu_agent.checkpoint import BadCheckpoint

PoolingMode: TypeAlias = Literal["cls", "mean", "max", "lasttoken", "weightedmean", "mean_sqrt_len"]

_MODULES: Final = "modules.json"
_POOLING: Final = "1_Pooling/config.json"
_FILES: Final = (_MODULES, _POOLING, "config_sentence_transformers.json")
_TRANSFORMER_FILE: Final = "sentence_bert_config.json"
_GENERATES: Final = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
_MODE_OF_KEY: Final[dict[str, PoolingMode]] = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}


@dataclass(frozen=True)
class Pooling:
    """How the last hidden states of one input become its vector.

    ``max_tokens``: of an input, as sentence-transformers cuts it; None where nothing says so.
    """

    mode: PoolingMode
    normalize: bool = True  # to length 1
    max_tokens: int | None = None


def find_pooling(folder: Path, config: Any, spec: ModelSpec) -> Pooling | None:
    """How the model in ``folder`` embeds; None where it generates. Raises BadCheckpoint."""
    if not _embeds(folder, config, spec):
        return None
    modules = _modules(folder)
    path = folder / (modules["Pooling"] if modules else "1_Pooling") / "config.json"
    if path.is_file():
        mode = _mode(path)
    elif modules:
        raise BadCheckpoint(f"{folder / _MODULES} names {path}, but there is no such file")
    else:
        mode = "mean" if _is_encoder(config) else "lasttoken"
    normalize = "Normalize" in modules if modules else True
    return Pooling(mode, normalize, _max_tokens(folder))


def _embeds(folder: Path, config: Any, spec: ModelSpec) -> bool:
    """The decision of the module's text, by its numbers."""
    if spec.runner != "auto":  # 1
        return spec.runner == "embed"
    if any((folder / name).is_file() for name in _FILES):  # 2
        return True
    named: list[str] = list(getattr(config, "architectures", None) or ())
    # Code that comes with a model may call its classes what it likes.
    named += getattr(config, "auto_map", None) or ()
    return bool(named) and not any(name.endswith(_GENERATES) for name in named)  # 3, 4


def _is_encoder(config: Any) -> bool:
    """Whether every token sees all others. Bert and its kin can be built as either."""
    from transformers.models.auto import modeling_auto

    if getattr(config, "is_decoder", False):
        return False
    kind = config.get_text_config().model_type
    masked = kind in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    return masked or kind not in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


# -- the files of sentence-transformers ----------------------------------------------------


def _modules(folder: Path) -> dict[str, str]:
    """The last part of each module's type -> its folder; {} without modules.json."""
    path = folder / _MODULES
    if not path.is_file():
        return {}
    try:
        found = {str(one["type"]).rpartition(".")[2]: str(one["path"]) for one in _json(path, list)}
    except (KeyError, TypeError) as error:
        raise BadCheckpoint(f"{path} is corrupt: {error!r}") from error
    strange = [name for name in found if name not in ("Transformer", "Pooling", "Normalize")]
    if strange:
        raise BadCheckpoint(
            f"{path} lists a {strange[0]} module, which is not supported: only Transformer, "
            "Pooling and Normalize are"
        )
    if "Pooling" not in found:
        raise BadCheckpoint(f"{path} lists no Pooling module: token vectors are not supported")
    if found.get("Transformer"):
        raise BadCheckpoint(
            f"{path} keeps the transformer in {found['Transformer']!r}: move its files up beside "
            "modules.json, as newer sentence-transformers write them"
        )
    return found


def _mode(path: Path) -> PoolingMode:
    said = _json(path, dict)
    modes = [mode for key, mode in _MODE_OF_KEY.items() if said.get(key)]
    if not modes and isinstance(said.get("pooling_mode"), str):  # the newer way to say it
        modes = [mode for mode in _MODE_OF_KEY.values() if mode == said["pooling_mode"]]
    if len(modes) != 1:
        asks = " and ".join(modes) if modes else "no known pooling"
        raise BadCheckpoint(f"{path} asks for {asks}: exactly one kind of pooling is supported")
    return modes[0]


def _max_tokens(folder: Path) -> int | None:
    path = folder / _TRANSFORMER_FILE
    if not path.is_file():
        return None
    said = _json(path, dict)
    if said.get("do_lower_case"):
        raise BadCheckpoint(
            f"{path} sets do_lower_case, which is not supported: set it in the tokenizer's files"
        )
    most = said.get("max_seq_length")
    return most if isinstance(most, int) and most > 0 else None


def _json(path: Path, kind: type) -> Any:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise BadCheckpoint(f"{path} is corrupt: {error!r}") from error
    if not isinstance(value, kind):
        raise BadCheckpoint(f"{path} is corrupt: it holds no JSON {kind.__name__}")
    return value
