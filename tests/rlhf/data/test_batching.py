"""Padding, batches by length and packed documents: every index once, order from the seed, nothing lost unsaid."""

from collections.abc import Iterator
from itertools import pairwise

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf.data.batching import BUCKET_BATCHES, length_batches, pack_documents, pad_left, pad_right, pass_batches
from rlhf.data.packing import shuffled_batches

lengths_of_rows = st.lists(st.integers(1, 60), min_size=1, max_size=300)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_padding() -> None:
    rows = [[4, 5, 6], [7], [8, 9]]
    assert pad_right(rows, 0).tolist() == [[4, 5, 6], [7, 0, 0], [8, 9, 0]]
    ids, mask = pad_left(rows, 0)
    assert ids.tolist() == [[4, 5, 6], [0, 0, 7], [0, 8, 9]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1], [0, 1, 1]]


@settings(max_examples=80, deadline=None)
@given(lengths_of_rows, st.integers(1, 40))
def test_without_shuffling_every_index_comes_once_by_length(lengths: list[int], batch_size: int) -> None:
    batches = length_batches(lengths, batch_size, None)
    flat = [index for batch in batches for index in batch]
    assert sorted(flat) == list(range(len(lengths)))
    assert [lengths[index] for index in flat] == sorted(lengths)
    assert all(len(batch) == batch_size for batch in batches[:-1])
    assert 1 <= len(batches[-1]) <= batch_size


@settings(max_examples=80, deadline=None)
@given(lengths_of_rows, st.integers(1, 40), st.integers(1, 500))
def test_a_pass_holds_so_many_rows_and_tokens(lengths: list[int], batch_size: int, tokens: int) -> None:
    batches = pass_batches(lengths, batch_size, tokens)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) <= batch_size
        assert len(batch) * max(lengths[index] for index in batch) <= tokens or len(batch) == 1
    assert pass_batches(lengths, batch_size) == length_batches(lengths, batch_size, None)  # short texts: no difference


@settings(max_examples=80, deadline=None)
@given(lengths_of_rows, st.integers(1, 40), st.integers(0, 1000))
def test_with_shuffling_every_index_comes_once_and_one_batch_may_be_smaller(lengths: list[int], batch_size: int,
                                                                            seed: int) -> None:
    batches = length_batches(lengths, batch_size, seeded(seed))
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    whole, rest = divmod(len(lengths), batch_size)
    assert sorted(len(batch) for batch in batches) == sorted([batch_size] * whole + [rest] * bool(rest))


@settings(max_examples=80, deadline=None)
@given(lengths_of_rows, st.integers(1, 9), st.integers(1, 5), st.integers(0, 1000))
def test_of_several_processes_each_has_as_many_rows_of_every_batch(lengths: list[int], share: int, processes: int,
                                                                   seed: int) -> None:
    for make in (length_batches, shuffled_batches):
        batches = list(make(lengths, share * processes, seeded(seed), multiple=processes))
        flat = [index for batch in batches for index in batch]
        assert set(flat) == set(range(len(lengths)))
        assert len(flat) - len(lengths) == -len(lengths) % processes
        assert all(len(batch) % processes == 0 for batch in batches)


def test_the_seed_decides_the_order() -> None:
    lengths = [1 + index % 7 for index in range(200)]
    assert length_batches(lengths, 8, seeded(1)) == length_batches(lengths, 8, seeded(1))
    assert length_batches(lengths, 8, seeded(1)) != length_batches(lengths, 8, seeded(2))


def test_batches_hold_rows_of_like_length_but_come_in_no_order() -> None:
    count, batch_size = 4 * BUCKET_BATCHES * 8, 8
    lengths = torch.randint(1, 100, (count,), generator=seeded(3)).tolist()
    batches = length_batches(lengths, batch_size, seeded(4))
    spread = sum(max(lengths[index] for index in batch) - min(lengths[index] for index in batch)
                 for batch in batches) / len(batches)
    assert spread < 15  # of about 80 in batches drawn blindly
    shortest = [min(lengths[index] for index in batch) for batch in batches]
    assert shortest != sorted(shortest)
    rising = sum(before < after for before, after in pairwise(shortest)) / len(shortest)
    assert 0.3 < rising < 0.7


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(1, 40)), min_size=1, max_size=80), st.integers(1, 9),
       st.integers(0, 5))
def test_indices_of_a_group_come_in_one_batch_or_where_a_batch_ends_among_them_in_two(
        rows: list[tuple[int, int]], batch_size: int, seed: int) -> None:
    groups, lengths = [group for group, _ in rows], [length for _, length in rows]
    batches = length_batches(lengths, batch_size, torch.Generator().manual_seed(seed), groups)
    flat = [index for batch in batches for index in batch]
    assert sorted(flat) == list(range(len(rows)))
    for batch in batches:  # consecutive places: between two of a group there is none of another
        own = [groups[index] for index in batch]
        assert [group for place, group in enumerate(own) if place == 0 or own[place - 1] != group] == list(
            dict.fromkeys(own))
    for group in set(groups):
        size = groups.count(group)
        assert sum(group in [groups[index] for index in batch] for batch in batches) <= -(-size // batch_size) + 1


def test_indices_that_are_all_apart_come_as_without_groups() -> None:
    lengths = [number * 7 % 31 for number in range(100)]
    plain = length_batches(lengths, 8, torch.Generator().manual_seed(3))
    assert length_batches(lengths, 8, torch.Generator().manual_seed(3), [1000 - 3 * n for n in range(100)]) == plain


def test_pack_puts_eos_before_each_document_and_drops_the_rest() -> None:
    rows = list(pack_documents([[1, 2, 3], [4], [5, 6], []], 4, eos_id=9))
    assert rows == [[9, 1, 2, 3], [9, 4, 9, 5]]  # 6 and the last EOS do not fill a row
    assert list(pack_documents([[1, 2, 3], [4], [5, 6], []], 5, eos_id=9)) == [[9, 1, 2, 3, 9], [4, 9, 5, 6, 9]]
    assert list(pack_documents([list(range(11))], 3, eos_id=99)) == [[99, 0, 1], [2, 3, 4], [5, 6, 7], [8, 9, 10]]
    assert list(pack_documents([[1, 2]], 4, eos_id=9)) == []


def test_pack_reads_no_further_than_the_row_that_is_asked_for() -> None:
    read = []

    def documents() -> Iterator[list[int]]:
        for number in range(5):
            read.append(number)
            yield [number] * 3

    rows = pack_documents(documents(), 4, eos_id=9)
    assert next(rows) == [9, 0, 0, 0]
    assert read == [0]
