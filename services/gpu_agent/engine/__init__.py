"""Engines: what runs a resident model. `native` is the embedded one.

Walk it as a request does: `native` -> `batch` -> `prompts` -> (each step: `kv`, `sampling`,
`row`, `detokenize`) -> messages for control.
"""
