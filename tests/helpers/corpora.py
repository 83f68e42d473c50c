"""Small corpora and a tokenizer of them, for the tests of `data/`."""

import json
import random
from collections.abc import Iterator
from pathlib import Path

from model.data.tokenizer import Tokenizer, train_tokenizer

SYLLABLES = [
    "ka",
    "lo",
    "mi",
    "nu",
    "te",
    "ra",
    "si",
    "do",
    "ve",
    "pu",
    "an",
    "el",
    "is",
    "on",
    "ur",
    "grü",
    "ña",
]


def sentences(count: int, seed: int = 0) -> Iterator[str]:
    """Yield texts of a few made-up words each; no two are the same."""
    random_ = random.Random(seed)
    for number in range(count):
        words = ["".join(random_.choices(SYLLABLES, k=random_.randint(1, 4))) for _ in range(40)]
        yield f"Text {number} of {seed}: " + " ".join(words) + "."


def small_tokenizer(path: Path, vocabulary: int = 320) -> Tokenizer:
    """Train a tokenizer on made-up sentences."""
    return train_tokenizer(sentences(300), vocabulary, 1.0, path)


def write_json_lines(path: Path, texts: Iterator[str] | list[str]) -> Path:
    """Write texts as JSON lines."""
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path
