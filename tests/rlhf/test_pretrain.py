"""The pretraining text: what is stored comes back, rows are packed as by hand, every row once a pass."""

import json
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from rlhf.errors import UserError
from rlhf.pretrain import LEAST_ROWS, corpus_batch, packed_rows, read_corpus, stored_texts


def test_stored_texts_are_the_texts(tmp_path: Path) -> None:
    texts = ["red", "", "ä€😀\nnew line", "x" * 300]
    found = stored_texts(iter(texts), tmp_path / "new")
    assert list(found) == texts
    assert list(found[:-1]) == texts[:-1]
    assert list(found[-2:]) == texts[-2:]


def test_packed_rows_are_the_ids_end_to_end(texts: list[str], tokenizer: PreTrainedTokenizerFast,
                                            tmp_path: Path) -> None:
    many = texts * 20  # more than one chunk of the tokenizer's
    stream = [token for text in many for token in [tokenizer.eos_token_id, *tokenizer(text)["input_ids"]]]
    rows = packed_rows(many, tokenizer, 32, tmp_path)
    assert len(many) > 256
    assert len(rows) == len(stream) // 32
    assert [token for row in rows for token in row] == stream[:len(rows) * 32]
    assert not list(tmp_path.iterdir())  # no file has a name


def test_a_corpus_that_is_next_to_empty(texts: list[str], tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    path = tmp_path / "corpus.jsonl"
    ids = tokenizer(texts[0])["input_ids"]
    enough = -(-LEAST_ROWS * 16 // (len(ids) + 1))
    for count, lacks in ((enough, False), (enough - 2, True)):
        path.write_text(f"{json.dumps({'text': texts[0]})}\n" * count)
        if lacks:
            with pytest.raises(UserError, match="nearly empty"):
                read_corpus(path, tokenizer, 16, tmp_path)
        else:
            assert len(read_corpus(path, tokenizer, 16, tmp_path)) == LEAST_ROWS


def test_every_row_once_a_pass_in_another_order() -> None:
    rows = [[number, number] for number in range(10)]
    passes = [[corpus_batch(rows, 2, step, 7).tolist() for step in range(start, start + 5)] for start in (0, 5)]
    flat = [[row for batch in one for row in batch] for one in passes]
    assert [sorted(one) for one in flat] == [rows, rows]
    assert flat[0] != flat[1]
    assert passes[0][1] == corpus_batch(rows, 2, 1, 7).tolist()  # after a later pass was asked for
    assert passes[0][0] != corpus_batch(rows, 2, 0, 8).tolist()
