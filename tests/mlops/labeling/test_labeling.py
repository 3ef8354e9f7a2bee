"""Batches, stored labels and agreement, against counts by hand, another library, and writers that are killed."""

import math
import multiprocessing
import random
import subprocess
import sys
import time
from collections import Counter
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from mlops.labeling.agreement import agreement, agreement_with, alpha, positions, preferences
from mlops.labeling.batch import Item, assign, in_item_order, make_items, read_batch, write_batch
from mlops.labeling.store import Label, LabelStore, check
from rlhf.errors import UserError
from rlhf.world.facts import World
from rlhf.world.labeler import GoldLabeler, SimulatedLabeler
from tests.flows.checkout import REPOSITORY


def row(number: int, use_case: str = "chat") -> dict[str, Any]:
    return {"prompt_id": f"ppo-{number}", "user_id": "u", "source": "customer", "split": "train", "use_case": use_case,
            "prompt": f"prompt {number}"}


def item(number: int, count: int = 4, use_case: str = "chat") -> Item:
    return Item(f"item-{number}", row(number, use_case), tuple(f"text {n}" for n in range(count)), ("ppo",) * count)


def label(labeler: str, ranks: list[int], number: int = 1) -> Label:
    return Label(f"{labeler}/{number}", f"item-{number}", labeler, tuple(ranks))


# --- batches ------------------------------------------------------------------------------------------------------


def test_items_mix_models_and_show_no_text_twice() -> None:
    answers = {"ppo": [["a", "b", "a"], ["same"] * 3, ["x", "y", "z"]],
               "sft": [["a", "c", "d"], ["same"] * 3, ["", "y", "w"]]}
    items = make_items([row(1), row(2), row(3)], answers, 4, 1)
    assert [found.row["prompt_id"] for found in items] == ["ppo-1", "ppo-3"]  # nothing to choose from in the second
    assert sorted(items[0].completions) == ["a", "b", "c", "d"]
    assert sorted(items[1].completions) == ["w", "x", "y", "z"]
    assert set(items[0].made_by) == {"ppo", "sft"}
    assert items == make_items([row(1), row(2), row(3)], answers, 4, 1)


def test_k_is_the_schema_s() -> None:
    with pytest.raises(UserError, match="10 completions per item: must be 2 to 9"):
        make_items([], {}, 10, 1)


def test_assignments() -> None:
    items = [item(number) for number in range(100)]
    found = assign(items, ["ada", "bob", "eve"], 0.3, 2, 1)
    per_item = Counter(entry.item_id for entry in found)
    assert sorted(per_item.values()) == [1] * 70 + [2] * 30
    assert len({(entry.item_id, entry.labeler_id) for entry in found}) == len(found) == 130
    loads = Counter(entry.labeler_id for entry in found).values()
    assert max(loads) - min(loads) <= 1
    assert all(sorted(entry.order) == [0, 1, 2, 3] for entry in found)
    assert len({entry.order for entry in found}) > 12  # shuffled, and not alike for two labelers
    together = Counter(tuple(sorted(entry.labeler_id for entry in found if entry.item_id == name))
                       for name, count in per_item.items() if count == 2)
    assert len(together) == 3  # everybody with everybody


@pytest.mark.parametrize(("labelers", "per_item", "said"), [
    (["ada", "ada"], 1, "expected distinct names"), ([], 1, "expected distinct names"),
    (["ada"], 2, "2 labelers per item: only 1 are named")])
def test_impossible_assignments_are_refused(labelers: list[str], per_item: int, said: str) -> None:
    with pytest.raises(UserError, match=said):
        assign([item(1)], labelers, 0.5, per_item, 1)


def test_one_labeler_needs_no_second_where_nothing_is_shared() -> None:
    assert len(assign([item(1), item(2)], ["ada"], 0.0, 2, 1)) == 2


def test_a_batch_is_read_as_written(tmp_path: Path) -> None:
    items = [item(1), item(2, 6)]
    assignments = assign(items, ["ada", "bob"], 1.0, 2, 1)
    write_batch(tmp_path, items, assignments)
    first = (tmp_path / "items.jsonl").read_bytes()
    assert read_batch(tmp_path) == ({found.item_id: found for found in items}, assignments)
    write_batch(tmp_path, items, assignments)
    assert (tmp_path / "items.jsonl").read_bytes() == first


# --- labels on disk -----------------------------------------------------------------------------------------------


def test_a_submission_counts_once_and_a_correction_last(tmp_path: Path) -> None:
    store = LabelStore(tmp_path / "new" / "labels.jsonl")
    first, second = label("ada", [1, 2, 3, 4]), Label("ada/1/again", "item-1", "ada", (4, 3, 2, 1))
    assert [store.add(first), store.add(first), store.add(second), store.add(first)] == [True, False, True, False]
    assert store.all() == [first, second]
    assert store.current() == {("item-1", "ada"): second}


def test_a_torn_line_is_cut_off(tmp_path: Path) -> None:
    store = LabelStore(tmp_path / "labels.jsonl")
    store.add(label("ada", [1, 2, 3, 4]))
    with store.path.open("ab") as file:
        file.write(b'{"submission_id": "ada/2", "it')
    assert len(store.all()) == 1
    store.add(label("ada", [1, 1, 2, 2], 2))
    assert [found.item_id for found in store.all()] == ["item-1", "item-2"]


WRITER = """
import sys
from pathlib import Path
from mlops.labeling.store import Label, LabelStore
store, name = LabelStore(Path(sys.argv[1])), sys.argv[2]
for number in range(100000):
    store.add(Label(f"{name}/{number}", f"item-{number}", name, (1, 2, 3, 4), (1, 2, 3, 4), ((), ("violent",), (), ())))
    print(number, flush=True)
"""


def test_confirmed_labels_survive_kills(tmp_path: Path) -> None:
    """Two writers at once, both killed after a random number of labels, again and again."""
    path, confirmed, rng = tmp_path / "labels.jsonl", set(), random.Random(1)

    def numbers(name: str) -> list[str]:
        return (tmp_path / name).read_text().split("\n")[:-1]

    for turn in range(6):
        writers = {}
        for name in (f"ada{turn}", f"bob{turn}"):
            with (tmp_path / name).open("w") as out:
                writers[name] = subprocess.Popen([sys.executable, "-c", WRITER, str(path), name], cwd=REPOSITORY,
                                                 stdout=out)
        for name, writer in writers.items():
            count = rng.randint(5, 30)
            while len(numbers(name)) < count and writer.poll() is None:
                time.sleep(0.001)
        for writer in writers.values():
            writer.kill()
            writer.wait()
        confirmed |= {f"{name}/{number}" for name in writers for number in numbers(name)}
    stored = [entry.submission_id for entry in LabelStore(path).all()]
    assert len(confirmed) >= 60
    assert confirmed <= set(stored)
    assert len(stored) == len(set(stored))


def _add(path: Path, start: int) -> None:
    for number in range(start, start + 25):
        LabelStore(path).add(label("ada", [1, 2, 3, 4], number % 40))


def test_the_same_submissions_from_several_processes(tmp_path: Path) -> None:
    path = tmp_path / "labels.jsonl"
    processes = [multiprocessing.get_context("fork").Process(target=_add, args=(path, start)) for start in (0, 10, 20)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert sorted(found.item_id for found in LabelStore(path).all()) == sorted(f"item-{number}" for number in range(40))


@pytest.mark.parametrize(("found", "said"), [
    (label("ada", [1, 2, 3]), "3 ranks for 4 completions"),
    (label("ada", [1, 1, 3, 3]), "1 is best, ties share a rank, none is left out"),
    (label("ada", [1, 2, 3, 4], 7), "no item item-7 in this batch"),
    (Label("x", "item-1", "ada", (1, 2, 3, 4), (0, 1, 2, 3)), "expected 4 numbers from 1 to 7"),
    (Label("x", "item-1", "ada", (1, 2, 3, 4), (), ((), (), ())), "flags for 3 of 4"),
    (Label("x", "item-1", "ada", (1, 2, 3, 4), (), ((), (), (), ("rude",))), "unknown flag rude"),
])
def test_an_invalid_label_is_refused(found: Label, said: str) -> None:
    with pytest.raises(UserError, match=said):
        check(found, {"item-1": item(1)})


# --- agreement ----------------------------------------------------------------------------------------------------


def test_preferences() -> None:
    assert preferences(label("ada", [1, 2, 2])) == {(0, 1): 1, (0, 2): 1, (1, 2): 0}


def test_agreement_by_hand() -> None:
    """ada and bob: 5 of 6 pairs; the tie of eve leaves 5 pairs with each of them."""
    items = {"item-1": item(1), "item-2": item(2, use_case="extract")}
    labels = [label("ada", [1, 2, 3, 4]), label("bob", [1, 2, 4, 3]), label("eve", [1, 1, 2, 3]),
              label("ada", [1, 2, 3, 4], 2)]
    found = agreement(labels, items)
    assert (found.overall.agreed, found.overall.pairs) == (5 + 5 + 4, 6 + 5 + 5)
    assert (found.by_labeler["ada"].agreed, found.by_labeler["ada"].pairs) == (10, 11)
    assert set(found.by_use_case) == {"chat"}  # the other item has one label
    assert found.adjudicate == []
    assert agreement([label("ada", [1, 2, 3, 4]), label("bob", [4, 3, 2, 1])], items).adjudicate == ["item-1"]
    assert agreement([label("ada", [1, 1, 1, 1]), label("bob", [4, 3, 2, 1])], items).adjudicate == ["item-1"]


def test_ties_of_all_labelers_are_agreement() -> None:
    """Such items were sent to be adjudicated, since no pair had a preference."""
    items = {f"item-{number}": item(number, 2) for number in range(1, 5)}
    labels = [label(name, ranks, number) for number, answers in enumerate(
        ([[1, 1]] * 3, [[1, 2]] * 3, [[1, 2], [2, 1], [1, 2]], [[1, 1], [1, 1], [1, 2]]), start=1)
        for name, ranks in zip(("ada", "bob", "eve"), answers, strict=True)]
    found = agreement(labels, items)
    assert found.adjudicate == ["item-3", "item-4"]
    assert (found.with_ties.agreed, found.with_ties.pairs) == (3 + 3 + 1 + 1, 12)
    assert agreement([entry for entry in labels if entry.item_id == "item-1"], items).adjudicate == []


def test_one_who_guesses_does_not_make_the_others_outliers() -> None:
    """ada shares most items with dud alone: without dud nothing speaks against ada."""
    rng = random.Random(3)
    items = {f"item-{number}": item(number) for number in range(100)}
    labels = [label(name, rng.sample([1, 2, 3, 4], 4) if name == "dud" else [1, 2, 3, 4], number)
              for number in range(100) for name in (("ada", "dud") if number < 60 else ("ada", "bob", "eve", "dud"))]
    assert agreement(labels, items).outliers == ["dud"]


def test_one_who_ranks_as_shown_is_found_by_the_order_of_presentation() -> None:
    rng = random.Random(4)
    items = [item(number, 2) for number in range(40)]
    assignments = assign(items, ["ada", "bob", "first"], 1.0, 3, 1)
    labels = []
    for given in assignments:
        shown = [1, 2] if given.labeler_id == "first" or rng.random() < 0.5 else [2, 1]
        labels.append(Label(f"{given.labeler_id}/{given.item_id}", given.item_id, given.labeler_id,
                            in_item_order(tuple(shown), given.order)))
    leaning, found = positions(labels, assignments)
    assert found == ["first"]
    assert leaning["first"].mean == 1
    assert abs(leaning["ada"].mean) < 0.5
    assert positions(labels, []) == ({}, [])


def test_alpha_is_krippendorff_s_formula() -> None:
    """1 − observed / expected disagreement over all pairs of values, ordinal metric."""
    rng = random.Random(5)
    choices = [[1, 2, 3], [2, 1, 3], [1, 1, 2], [3, 2, 1]]
    groups = [[label(name, rng.choice(choices), number) for name in ("a", "b", "c")] for number in range(20)]
    units = [[preferences(entry)[pair] for entry in group] for group in groups for pair in combinations(range(3), 2)]
    values = [value for unit in units for value in unit]
    count = Counter(values)
    total = len(values)
    steps = sorted(count)

    def distance(a: int, b: int) -> float:  # ordinal: what lies between, half of the ends
        low, high = sorted((a, b))
        between = sum(count[step] for step in steps if low <= step <= high)
        return float((between - (count[a] + count[b]) / 2) ** 2)

    observed = sum(distance(a, b) for unit in units for a, b in combinations(unit, 2)) * 2 / 2 / total
    expected = sum(count[a] * count[b] * distance(a, b) for a in steps for b in steps) / total / (total - 1)
    assert alpha(groups) == pytest.approx(1 - observed / expected, abs=1e-12)


def test_alpha_without_overlap_or_difference() -> None:
    assert math.isnan(agreement([label("ada", [1, 2, 3, 4])], {"item-1": item(1)}).alpha)
    assert math.isnan(alpha([[label("ada", [1, 1]), label("bob", [1, 1])]]))


def test_someone_who_guesses_is_an_outlier() -> None:
    rng = random.Random(2)
    items = {f"item-{number}": item(number) for number in range(60)}
    labels = [label(name, [1, 2, 3, 4] if name != "dud" else rng.sample([1, 2, 3, 4], 4), number)
              for number in range(60) for name in ("ada", "bob", "eve", "dud")]
    for number in range(0, 60, 7):  # people err
        labels.append(Label(f"again{number}", f"item-{number}", "ada", (2, 1, 3, 4)))
    last = {(entry.item_id, entry.labeler_id): entry for entry in labels}
    assert agreement(last.values(), items).outliers == ["dud"]


def test_the_simulated_labelers_agree_as_the_paper_s_do() -> None:
    """73 ± 3 % through this module, on completions like the reward model's."""
    from rlhf.world.datasets import rm_rows

    world = World(1)
    gold = GoldLabeler(world)
    labelers = [SimulatedLabeler(world, f"labeler-{number:02d}") for number in range(1, 6)]
    items, labels = {}, []
    for number, ranked in zip(range(300), rm_rows(world, 0.02), strict=False):
        name, prompt, texts = f"item-{number}", ranked["prompt"], ranked["completions"]
        items[name] = Item(name, ranked, tuple(texts), ("x",) * len(texts))
        graded = gold.grades([prompt] * len(texts), texts)
        for labeler in labelers:
            rng = random.Random(f"{number} {labeler.labeler_id}")
            ranks = labeler.rank(graded, "high_stakes" in gold.slices(prompt), rng)
            labels.append(Label(f"{labeler.labeler_id}/{number}", name, labeler.labeler_id, tuple(ranks)))
    found = agreement(labels, items)
    assert found.overall.share == pytest.approx(0.73, abs=0.03)
    assert 0.3 < found.alpha < 0.6


def test_screening_against_known_rankings() -> None:
    """By hand: ada has 5 of 6 pairs of the first item right and all of the second, eve none of 60."""
    truth = {f"item-{number}": (1, 2, 3, 4) for number in range(10)}
    ada = [Label("a", "item-0", "ada", (1, 2, 4, 3)), *(Label("a", f"item-{number}", "ada", (1, 2, 3, 4))
                                                       for number in range(1, 10))]
    eve = [Label("e", f"item-{number}", "eve", (4, 3, 2, 1)) for number in range(10)]
    found, outliers = agreement_with(truth, [*ada, *eve, Label("x", "unknown", "bob", (1, 2, 3, 4))])
    assert {name: (count.agreed, count.pairs) for name, count in found.items()} == {"ada": (59, 60), "eve": (0, 60)}
    assert outliers == ["eve"]
    assert agreement_with({}, ada) == ({}, [])
