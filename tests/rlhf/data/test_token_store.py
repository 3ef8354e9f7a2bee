"""Token stores and streamed rows: the same rows and batches as with lists, constant memory, a kill."""

import json
import os
import random
import signal
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf.data.batching import BUCKET_BATCHES, length_batches
from rlhf.data.rows import Drawn, Rows, of_split
from rlhf.data.token_store import Column, TokenStore, chunks, lengths_of, only
from rlhf.model.chat_format import PromptCodec
from rlhf.model.load import load_policy
from rlhf.ppo.run import encode_prompts
from rlhf.reward_model import Rankings, sample_rows
from rlhf.sft import Demonstrations
from rlhf.training.seeding import generator

WORDS = ("red", "blue", "rice", "fish", "forest", "désert", "home", "ba-do", "mi-ka", "what")
lists_of_ids = st.lists(st.integers(0, 2**32 - 1), max_size=20)


@pytest.fixture(scope="module")
def codec(tokenizer: Any) -> PromptCodec:
    return PromptCodec(tokenizer)


def sentence(rng: random.Random, longest: int = 12) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randrange(1, longest)))


def rankings(count: int) -> Iterator[dict[str, Any]]:
    rng = random.Random(1)
    for number in range(count):
        size = rng.randrange(2, 7)
        yield {"prompt": sentence(rng), "completions": [sentence(rng, 30) for _ in range(size)],
               "ranks": [rng.randrange(1, size + 1) for _ in range(size)],
               "split": "valid" if number % 5 == 0 else "train"}


# --- the store -------------------------------------------------------------------------------------------------------

@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(lists_of_ids, min_size=1, max_size=5), max_size=20))
def test_rows_are_read_back_unchanged(rows: list[list[list[int]]]) -> None:
    store = TokenStore()
    for row in rows:
        store.append(row, len(row[0]))
    assert [store[number] for number in range(len(store))] == rows
    assert list(store.lengths()) == [len(row[0]) for row in rows]


def test_rows_can_be_read_between_appends(tmp_path: Path) -> None:
    store = TokenStore(tmp_path)
    for number in range(100):
        store.append([[number, 70_000 + number], []], 2)
        assert store[number] == [[number, 70_000 + number], []]
    assert store[0] == [[0, 70_000], []]


def test_ids_take_two_bytes_or_four_and_numbers_out_of_range_are_refused(tmp_path: Path) -> None:
    store = TokenStore(tmp_path)
    for ids in ([65_535] * 100, [65_536] * 100):
        store.append([ids], 100)
    assert [store[0], store[1]] == [[[65_535] * 100], [[65_536] * 100]]
    ends = store._ends.tolist()
    assert [ends[1] - ends[0], ends[2] - ends[1]] == [1 + 2 * 102, 1 + 4 * 102]
    for wrong in (-1, 2**32):
        with pytest.raises(OverflowError):
            store.append([[wrong]], 1)
    assert len(store) == 2


def test_equal_rows_give_equal_bytes(tmp_path: Path) -> None:
    def content() -> bytes:
        store = TokenStore(tmp_path)
        for row in rankings(300):
            store.append([row["ranks"], *([len(text), 70_000] for text in row["completions"])], 1)
        assert store[0]
        return store.raw(0, store._ends[-1])
    assert content() == content()


def test_a_column_is_a_sequence(tmp_path: Path) -> None:
    store = TokenStore(tmp_path / "made" / "here")
    column = Column(store, only)
    assert not column
    assert list(column) == []
    assert list(lengths_of(column)) == []
    with pytest.raises(IndexError):
        column[0]
    for number in range(5):
        store.append([[number] * number], number)
    assert len(column) == 5
    held = [[], [1], [2, 2], [3, 3, 3], [4, 4, 4, 4]]
    assert list(column) == held
    assert column[-1] == held[-1]
    for part in (slice(None), slice(1, 3), slice(1, None, 2), slice(None, None, -1), slice(5, 9)):
        shown = column[part]
        assert isinstance(shown, Column)
        assert list(shown) == held[part]
        assert list(lengths_of(shown)) == lengths_of(held[part])
    assert list(column[1:][::2]) == held[1:][::2]
    for number in (5, -6):
        with pytest.raises(IndexError):
            column[number]


KILLED = """
import os, signal, sys
from pathlib import Path
from rlhf.data.token_store import TokenStore
store = TokenStore(Path(sys.argv[1]))
for number in range(200_000):
    store.append([[number] * 10], 10)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_writer_leaves_no_file(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == -signal.SIGKILL
    assert list(tmp_path.iterdir()) == []
    store = TokenStore(tmp_path)
    store.append([[1, 2]], 2)
    assert store[0] == [[1, 2]]


def test_two_stores_in_one_folder_do_not_interfere(tmp_path: Path) -> None:
    one, other = TokenStore(tmp_path), TokenStore(tmp_path)
    for number in range(1000):
        one.append([[number]], 1)
        other.append([[number + 1]], 1)
    assert (one[999], other[999]) == ([[999]], [[1000]])


# --- rows ------------------------------------------------------------------------------------------------------------

def test_rows_are_read_again_in_each_pass_and_sampled_as_from_a_list(tmp_path: Path) -> None:
    held = list(rankings(200))
    path = tmp_path / "rm.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in held))
    rows = Rows(path)
    assert list(rows) == list(rows) == held
    valid = [row for row in held if row["split"] == "valid"]
    assert list(of_split(rows, "valid")) == list(of_split(held, "valid")) == valid
    for count in (0, 1, 7, 40, 41):
        sample = sample_rows(of_split(rows, "valid"), count, seed=3)
        drawn = torch.randperm(len(valid), generator=generator(3, "rm", "sample"))[:count or len(valid)].tolist()
        assert list(sample) == list(sample) == [valid[number] for number in sorted(drawn)]
    assert list(Drawn([], lambda total: [])) == []


def test_chunks_have_the_given_size_except_the_last() -> None:
    assert list(chunks(range(7), 3)) == [[0, 1, 2], [3, 4, 5], [6]]
    assert list(chunks([], 3)) == []


# --- the stages' datasets --------------------------------------------------------------------------------------------

def test_the_datasets_of_the_stages_are_those_of_lists(codec: PromptCodec, policy_folder: Path, tmp_path: Path) -> None:
    model = load_policy(policy_folder)
    rows, limit = list(rankings(600)), 60  # more than two chunks
    prompts, completions = [row["prompt"] for row in rows], [row["completions"][0] for row in rows]
    heads, tails = codec.prompts(prompts), codec.completions(completions)
    expected = [head + tail for head, tail in zip(heads, tails, strict=True)]
    fit = [number for number, ids in enumerate(expected) if len(ids) <= limit]
    assert 0 < len(fit) < 600

    data = Demonstrations.encode(codec, iter(prompts), iter(completions), limit, tmp_path)
    lists = Demonstrations([expected[number] for number in fit], [len(heads[number]) for number in fit], 600 - len(fit))
    assert (list(data.ids), data.too_long) == (lists.ids, lists.too_long)
    assert list(data.prompt_lengths) == lists.prompt_lengths
    for indices in length_batches(lengths_of(data.ids), 16, torch.Generator().manual_seed(1))[:3]:
        (batch, token_indices), (other, other_indices) = (some.batch(model, indices, 0) for some in (data, lists))
        assert torch.equal(batch.ids, other.ids)
        assert torch.equal(token_indices, other_indices)

    groups = [[head + tail for tail in codec.completions(row["completions"])]
              for head, row in zip(heads, rows, strict=True)]
    short = [number for number, group in enumerate(groups) if max(map(len, group)) <= limit]
    ranked = Rankings.encode(codec, iter(rows), limit, tmp_path)
    held = Rankings([groups[number] for number in short], [rows[number]["ranks"] for number in short], 600 - len(short))
    assert (list(ranked.ids), list(ranked.ranks), ranked.too_long) == (held.ids, held.ranks, held.too_long)
    assert list(ranked.lengths()) == held.lengths()
    for mine, theirs in zip(ranked.batch_ranks([3, 1, 2]), held.batch_ranks([3, 1, 2]), strict=True):
        assert torch.equal(mine, theirs)

    fitting, count = encode_prompts(codec, iter(prompts), 15, tmp_path)
    assert count == 600
    assert list(fitting) == [(text, ids) for text, ids in zip(prompts, heads, strict=True) if len(ids) <= 15]
    assert list(tmp_path.iterdir()) == []


def batches_of_lists(lengths: list[int], batch_size: int, shuffle: torch.Generator | None) -> list[list[int]]:
    """The same batches, built with plain lists."""
    count = len(lengths)
    if shuffle is None:
        order = sorted(range(count), key=lambda index: (lengths[index], index))
        return [order[start:start + batch_size] for start in range(0, count, batch_size)]
    order = torch.randperm(count, generator=shuffle).tolist()
    batches = []
    for start in range(0, len(order), batch_size * BUCKET_BATCHES):
        bucket = sorted(order[start:start + batch_size * BUCKET_BATCHES], key=lambda index: (lengths[index], index))
        batches += [bucket[place:place + batch_size] for place in range(0, len(bucket), batch_size)]
    return [batches[index] for index in torch.randperm(len(batches), generator=shuffle).tolist()]


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(1, 9), max_size=300), st.integers(1, 20), st.integers(0, 99))
def test_batches_are_those_of_lists(lengths: list[int], batch_size: int, seed: int) -> None:
    def both(shuffle: Any) -> None:
        batches, expected = (make(lengths, batch_size, shuffle()) for make in (length_batches, batches_of_lists))
        assert batches == expected
        assert [len(batches), list(batches), batches[-2:]] == [len(expected), expected, expected[-2:]]
        assert all(type(index) is int for batch in batches for index in batch)
    both(lambda: None)
    both(lambda: torch.Generator().manual_seed(seed))


def test_memory_does_not_grow_with_the_rows(codec: PromptCodec, tmp_path: Path) -> None:
    """12 bytes per row, spare capacity of the arrays and the order of an epoch fit in 48 bytes; lists take 3,500."""
    def peak(count: int) -> int:
        tracemalloc.start()
        data = Rankings.encode(codec, of_split(rankings(count), "train"), 200, tmp_path)
        batches = length_batches(data.lengths(), 16, torch.Generator().manual_seed(1))
        assert max(map(len, (data.ids[index] for index in batches[0]))) <= 6
        assert len(data.ids) == count - -(-count // 5)
        peak_bytes = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak_bytes

    peak(300)  # warm-up: objects that are created once
    assert peak(16_000) < peak(1000) + 48 * 16_000
