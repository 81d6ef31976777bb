"""Calibration and evaluation texts: from files to rows of tokens."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_ALLOWED = (
    'a string, or an object with "text", with "messages", with "prompt" and "completion" or with "question" '
    'and "answer"'
)
_PAIRS = (("prompt", "completion"), ("question", "answer"))


def read_texts(path: Path, tokenizer: Any, setting: str) -> list[str]:
    """Texts of a .jsonl file (one a line), or of any other file (separated by empty lines).

    Raises ValueError that names `setting`, the file and, for .jsonl, the line.
    """
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{setting}={str(path)!r} can't be read: {error}") from error
    if path.suffix != ".jsonl":
        texts = [part.strip() for part in content.split("\n\n")]
    else:
        texts = []
        for number, line in enumerate(content.splitlines(), 1):
            if line.strip():
                try:
                    texts.append(_text(json.loads(line), tokenizer))
                except ValueError as error:
                    raise ValueError(
                        f"{setting}={str(path)!r}: line {number}: {error}: allowed is {_ALLOWED}"
                    ) from error
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise ValueError(f"{setting}={str(path)!r} holds no text")
    return texts


def _text(value: Any, tokenizer: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, dict):
        if isinstance(value.get("text"), str):
            return str(value["text"])
        for first, second in _PAIRS:
            if isinstance(value.get(first), str) and isinstance(value.get(second), str):
                return f"{value[first]}\n{value[second]}"
        if isinstance(value.get("messages"), list):
            return str(tokenizer.apply_chat_template(value["messages"], tokenize=False))
    raise ValueError(f"{json.dumps(value)[:60]} is no text")


def to_rows(texts: Iterable[str | Sequence[int]], tokenizer: Any, length: int, most: int) -> list[Tensor]:
    """At most `most` rows (1, up to `length` tokens) int64; a long text is cut into several, none are
    joined."""
    rows: list[Tensor] = []
    for text in texts:
        if isinstance(text, str) and tokenizer is None:
            raise ValueError("calibration holds strings: give their tokenizer=, or rows of token ids instead")
        ids = tokenizer(text).input_ids if isinstance(text, str) else list(text)
        for start in range(0, len(ids), length):
            # A last token alone has nothing to be predicted.
            if len(part := ids[start : start + length]) > 1:
                rows.append(torch.tensor([part], dtype=torch.int64))
                if len(rows) == most:
                    return rows
    return rows
