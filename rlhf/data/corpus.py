"""The documents of the pretraining corpus: those that stages train on, and its end, which none does."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from rlhf.data.schema import read_rows

HELD_OUT, HELD_OUT_SHARE = 500, 0.05


def held_out_count(documents: int) -> int:
    """How many documents at the end of a corpus no stage trains on: 500, or a twentieth of a small corpus."""
    return min(HELD_OUT, int(HELD_OUT_SHARE * documents))


def corpus_texts(path: Path, held_out: bool = False) -> Iterator[str]:
    """The documents of a corpus file that stages train on, or with `held_out` the others, which measure perplexity."""
    count = sum(1 for _ in read_rows(path))
    cut = count - held_out_count(count)
    texts = (row["text"] for row in read_rows(path))
    return islice(texts, cut, None) if held_out else islice(texts, cut)
