"""How a model writes calls of tools, found in its chat template: no other file says it.

Templates are looked for where transformers does: chat_template.jinja, then the folder
additional_chat_templates (of which "tool_use" is taken where there are tools), then
tokenizer_config.json.
"""

import json
import re
from pathlib import Path
from typing import Any, Final

from schemas.state import ToolFormat

# Also shown in texts where there are tools, though tokenizers may have them as special tokens.
MARKERS: Final = (
    "<tool_call>",
    "</tool_call>",
    "<|python_tag|>",
    "[TOOL_CALLS]",
    "[CALL_ID]",
    "[ARGS]",
)
_FILE: Final = "chat_template.jinja"


def format_of(template: str | None) -> ToolFormat:
    """What the text of a chat template tells."""
    if not template or not re.search(r"\btools\b", template):
        return ""
    if "[TOOL_CALLS]" in template:
        return "mistral2" if "[ARGS]" in template else "mistral"
    if "<tool_call>" in template:
        # Qwen3-Coder and its kin write XML there.
        return "json" if "<function=" in template else "hermes"
    if "<|python_tag|>" in template or re.search(r'"parameters\\?"\s*:', template):
        return "llama"
    return "json"


def find_tool_format(folder: Path) -> ToolFormat:
    """Of the model in ``folder``. Files that can not be read tell nothing: loading will say so."""
    return format_of(_tool_template(folder))


def _tool_template(folder: Path) -> str | None:
    for path in (folder / "additional_chat_templates" / "tool_use.jinja", folder / _FILE):
        if (text := _read(path)) is not None:
            return text
    try:
        said: Any = json.loads(_read(folder / "tokenizer_config.json") or "{}")
    except ValueError:
        return None
    found = said.get("chat_template") if isinstance(said, dict) else None
    if isinstance(found, list):  # several, with names
        named = {one.get("name"): one.get("template") for one in found if isinstance(one, dict)}
        found = named.get("tool_use", named.get("default"))
    return found if isinstance(found, str) else None


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return None
