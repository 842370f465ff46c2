"""Loads a model's own tokenizer, from a local `tokenizer.json`, to count prompts exactly (extra `[tokenizer]`).

Shell: reads the file. Counting itself is pure, but takes 0.2 to 0.5 ms a KiB (docs/loads.md), hence the limit.
"""

import importlib
from collections.abc import Callable
from pathlib import Path

from extproc.errors import ConfigError


def load_tokenizer(path: str) -> Callable[[str], int]:
    """A function that counts a text's tokens, special ones included, as the engine does. Raises ConfigError.

    `path`: the file, or the model's folder that it is in. Nothing is ever downloaded.
    """
    try:
        tokenizers = importlib.import_module("tokenizers")
    except ImportError:
        raise ConfigError(
            "tokenizer_path: needs the package tokenizers: pip install 'extproc[tokenizer]', or leave the setting out"
        ) from None
    file = Path(path)
    if file.is_dir():
        file /= "tokenizer.json"
    if not file.is_file():
        raise ConfigError(f"tokenizer_path: {file}: no such file (expected a tokenizer.json, or a folder with one)")
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises plain Exception
        raise ConfigError(f"tokenizer_path: {file}: not a tokenizer.json: {error}") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return lambda text: len(tokenizer.encode(text).ids)
