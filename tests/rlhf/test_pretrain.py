"""The pretraining text: what is stored comes back, rows are packed as by hand, every row once a pass."""

import json
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from rlhf.data.corpus import corpus_texts, held_out_count
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
    trained_on = -(-LEAST_ROWS * 16 // (len(ids) + 1))
    enough = next(count for count in range(100) if count - held_out_count(count) >= trained_on)
    for count, lacks in ((enough, False), (enough - 2, True)):
        path.write_text(f"{json.dumps({'text': texts[0]})}\n" * count)
        if lacks:
            with pytest.raises(UserError, match="nearly empty"):
                read_corpus(path, tokenizer, 16, tmp_path)
        else:
            assert len(read_corpus(path, tokenizer, 16, tmp_path)) == LEAST_ROWS


def test_the_end_of_a_corpus_is_held_out_from_every_stage(tmp_path: Path) -> None:
    path = tmp_path / "corpus.jsonl"
    for count, held_out in ((10, 0), (60, 3), (20_000, 500)):
        path.write_text("".join(f"{json.dumps({'text': str(number)})}\n" for number in range(count)))
        assert list(corpus_texts(path)) == list(map(str, range(count - held_out)))
        assert list(corpus_texts(path, held_out=True)) == list(map(str, range(count - held_out, count)))


def test_rows_are_as_long_as_asked_else_as_the_context(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    path = tmp_path / "corpus.jsonl"
    path.write_text(f"{json.dumps({'text': 'red blue ' * 50})}\n" * 400)
    for context, row_tokens, length in ((64, 0, 64), (64, 32, 32), (9000, 0, 2048)):
        assert {len(row) for row in read_corpus(path, tokenizer, context, tmp_path, row_tokens)} == {length}
    with pytest.raises(UserError, match="pretraining rows of 65 tokens: the model's context is 64"):
        read_corpus(path, tokenizer, 64, tmp_path, 65)


def test_every_row_once_a_pass_in_another_order() -> None:
    rows = [[number, number] for number in range(10)]
    passes = [[corpus_batch(rows, 2, step, 7).tolist() for step in range(start, start + 5)] for start in (0, 5)]
    flat = [[row for batch in one for row in batch] for one in passes]
    assert [sorted(one) for one in flat] == [rows, rows]
    assert flat[0] != flat[1]
    assert passes[0][1] == corpus_batch(rows, 2, 1, 7).tolist()  # after a later pass was asked for
    assert passes[0][0] != corpus_batch(rows, 2, 0, 8).tolist()
