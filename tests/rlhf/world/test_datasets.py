"""The embedded datasets: the paper's counts and mix, disjoint splits, rankings, labelers that disagree."""

import os
import random
import re
import subprocess
import sys
from collections import Counter
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from rlhf.data.schema import KEYS, PAPER_ROWS, USE_CASE_PERCENT, expected_rows, read_rows, split_by_shares, write_rows
from rlhf.errors import UserError
from rlhf.world.datasets import HELD_OUT_LABELERS, TRAINING_LABELERS, candidates, ppo_rows, rm_rows, sft_rows
from rlhf.world.facts import World
from rlhf.world.labeler import GoldLabeler, SimulatedLabeler, grade
from rlhf.world.prompts import slices_of, write_task

SCALE = 0.02
Rows = list[dict[str, Any]]
NAME = re.compile(r"\b[a-z]+-[a-z]+\b")


@pytest.fixture(scope="module")
def data(world: World) -> dict[str, Rows]:
    return {"sft": list(sft_rows(world, SCALE)), "rm": list(rm_rows(world, SCALE)),
            "ppo": list(ppo_rows(world, SCALE))}


def test_full_scale_has_the_counts_of_the_paper() -> None:
    assert {name: sum(expected_rows(name).values()) for name in PAPER_ROWS} == {
        "sft": 14_378, "rm": 51_094, "ppo": 47_329}
    assert expected_rows("sft") == {("train", "labeler"): 11_295, ("train", "customer"): 1_430,
                                    ("valid", "labeler"): 1_550, ("valid", "customer"): 103}
    assert expected_rows("rm") == {("train", "labeler"): 6_623, ("train", "customer"): 26_584,
                                   ("valid", "labeler"): 3_488, ("valid", "customer"): 14_399}
    assert expected_rows("ppo") == {("train", "customer"): 31_144, ("valid", "customer"): 16_185}
    labeler_written = sum(count for (_, source), count in expected_rows("sft").items() if source == "labeler")
    assert labeler_written == 12_845  # as the seed article says


def test_the_use_case_mix_is_that_of_the_paper() -> None:
    assert USE_CASE_PERCENT == {
        "generation": 45.6, "open_qa": 12.4, "brainstorming": 11.2, "chat": 8.4, "rewrite": 6.6, "summarization": 4.2,
        "classification": 3.5, "other": 3.5, "closed_qa": 2.6, "extract": 1.9}
    for total in (1, 2, 99, 11_295):
        counts = split_by_shares(total, USE_CASE_PERCENT)
        assert sum(counts.values()) == total
        weight = sum(USE_CASE_PERCENT.values())
        assert all(abs(counts[name] - total * share / weight) < 1 for name, share in USE_CASE_PERCENT.items())


@pytest.mark.parametrize(("dataset", "expected"), [
    ("sft", {("train", "labeler"): 226, ("train", "customer"): 29, ("valid", "labeler"): 31, ("valid", "customer"): 2}),
    ("rm", {("train", "labeler"): 132, ("train", "customer"): 532, ("valid", "labeler"): 70,
            ("valid", "customer"): 288}),
    ("ppo", {("train", "customer"): 623, ("valid", "customer"): 324})])
def test_rows(data: dict[str, Rows], dataset: str, expected: dict[tuple[str, str], int]) -> None:
    rows = data[dataset]
    assert Counter((row["split"], row["source"]) for row in rows) == expected
    assert all(list(row) == KEYS[dataset] for row in rows)
    assert len({row["prompt"] for row in rows}) == len(rows)
    assert len({row["prompt_id"] for row in rows}) == len(rows)
    for (split, source), count in expected.items():
        counted = Counter(row["use_case"] for row in rows if (row["split"], row["source"]) == (split, source))
        assert all(abs(counted[name] - count * share / 99.9) < 1 for name, share in USE_CASE_PERCENT.items())


def test_no_user_is_in_two_splits_or_over_the_cap(data: dict[str, Rows]) -> None:
    by_split: dict[str, set[str]] = {"train": set(), "valid": set()}
    for rows in data.values():
        for row in rows:
            by_split[row["split"]].add(row["user_id"])
        counts = Counter(row["user_id"] for row in rows)
        assert max(counts.values()) <= 200
        assert max(counts.values()) > 2 * min(counts.values())  # some write much, some little
    assert not by_split["train"] & by_split["valid"]
    assert all(row["user_id"].startswith("writer" if row["source"] == "labeler" else "customer")
               for rows in data.values() for row in rows)


def test_the_user_cap_is_reached_and_not_exceeded(world: World) -> None:
    rows = list(ppo_rows(world, 0.3))
    counts = Counter(row["user_id"] for row in rows)
    assert max(counts.values()) == 200


def test_valid_prompts_are_about_entities_that_no_train_prompt_names(world: World, data: dict[str, Rows]) -> None:
    for rows in data.values():
        for row in rows:
            pool, other = world.pools[row["split"]], world.pools["train" if row["split"] == "valid" else "valid"]
            names = set(NAME.findall(row["prompt"]))
            assert names
            assert names <= {*pool.creatures, *pool.people}
            assert not names & {*other.creatures, *other.people}


def test_rankings(data: dict[str, Rows]) -> None:
    sizes: Counter[int] = Counter()
    ties = 0
    for row in data["rm"]:
        ranks = row["ranks"]
        assert len(row["completions"]) == len(ranks) == len(set(row["completions"]))
        assert set(ranks) == set(range(1, max(ranks) + 1))
        assert max(ranks) > 1  # something is preferred
        assert all(row["completions"])
        sizes[len(ranks)] += 1
        ties += len(set(ranks)) < len(ranks)
    assert set(sizes) == {4, 5, 6, 7, 8, 9}
    assert min(sizes.values()) > 100
    assert 0.3 < ties / len(data["rm"]) < 0.98


def test_held_out_labelers_rank_valid_rows_only(data: dict[str, Rows]) -> None:
    used: dict[str, Counter[str]] = {"train": Counter(), "valid": Counter()}
    for row in data["rm"]:
        used[row["split"]][row["labeler_id"]] += 1
    assert not set(TRAINING_LABELERS) & set(HELD_OUT_LABELERS)
    assert set(used["train"]) == set(TRAINING_LABELERS)
    assert set(HELD_OUT_LABELERS) <= set(used["valid"])
    held_out = sum(used["valid"][name] for name in HELD_OUT_LABELERS)
    assert 0.25 < held_out / used["valid"].total() < 0.45


@pytest.mark.parametrize("dataset", ["sft", "rm", "ppo"])
def test_every_dataset_contains_the_slices(world: World, data: dict[str, Rows], dataset: str) -> None:
    gold = GoldLabeler(world)
    for split in ("train", "valid"):
        counted = Counter(name for row in data[dataset] if row["split"] == split for name in gold.slices(row["prompt"]))
        assert set(counted) <= {"false_premise", "ambiguous", "high_stakes"}
        if (dataset, split) != ("sft", "valid"):  # 33 rows
            assert set(counted) == {"false_premise", "ambiguous", "high_stakes"}


def test_demonstrations_are_good_but_not_perfect_and_labelers_write_better(world: World) -> None:
    gold = GoldLabeler(world)
    rows = list(sft_rows(world, 0.1))
    scores = {source: [gold.scores([row["prompt"]], [row["completion"]])[0] for row in rows if row["source"] == source]
              for source in ("labeler", "customer")}
    means = {source: sum(values) / len(values) for source, values in scores.items()}
    assert 6 < means["customer"] < means["labeler"] < 6.95
    assert 0.5 < sum(score == 7 for score in scores["labeler"]) / len(scores["labeler"]) < 0.9


def test_labelers_agree_on_73_percent(world: World) -> None:
    """Over pairs where both have a preference, as the paper counts; and each agrees with the truth more than that."""
    rng = random.Random(31)
    labelers = [SimulatedLabeler(world, name) for name in TRAINING_LABELERS + HELD_OUT_LABELERS]
    agreed = pairs = true = judged = 0
    for _ in range(1500):
        use_case = rng.choices(list(USE_CASE_PERCENT), list(USE_CASE_PERCENT.values()))[0]
        task = write_task(world, use_case, "train", rng)
        graded = [grade(world, task, text) for text in candidates(world, task, rng.randrange(4, 10), rng)]
        stakes = "high_stakes" in slices_of(world, task)
        first, second = (labeler.rank(graded, stakes, rng) for labeler in rng.sample(labelers, 2))
        for one, other in combinations(range(len(graded)), 2):
            a, b = first[one] - first[other], second[one] - second[other]
            if a and b:
                pairs += 1
                agreed += (a > 0) == (b > 0)
            gap = graded[one].score - graded[other].score
            if a and abs(gap) > 1.5:
                judged += 1
                true += (a < 0) == (gap > 0)
    assert pairs > 10_000
    assert agreed / pairs == pytest.approx(0.73, abs=0.03)
    assert true / judged > 0.8


def test_labelers_differ_and_each_is_reproducible(world: World) -> None:
    habits = [(labeler.misread["helpful"], labeler.lapse)
              for labeler in (SimulatedLabeler(world, name) for name in TRAINING_LABELERS)]
    assert len(set(habits)) > 25
    again = SimulatedLabeler(World(1), TRAINING_LABELERS[3])
    assert (again.misread["helpful"], again.lapse) == habits[3]


def test_the_bytes_depend_on_the_seed_only(world: World, tmp_path: Path) -> None:
    """Two processes with other hash seeds write the same files; another world writes others."""
    code = ("import hashlib, sys\nfrom pathlib import Path\nfrom rlhf.data.schema import write_rows\n"
            "from rlhf.world.datasets import ppo_rows, rm_rows, sft_rows\nfrom rlhf.world.facts import World\n"
            "for rows in (sft_rows, rm_rows, ppo_rows):\n    path = Path(sys.argv[1]) / rows.__name__\n"
            "    write_rows(path, rows(World(int(sys.argv[2])), 0.004))\n"
            "    print(hashlib.sha256(path.read_bytes()).hexdigest())")
    outputs = [subprocess.run([sys.executable, "-c", code, str(tmp_path), seed], capture_output=True, text=True,
                              check=True, env={**os.environ, "PYTHONHASHSEED": hash_seed}).stdout
               for seed, hash_seed in (("1", "1"), ("1", "2"), ("2", "1"))]
    assert outputs[0] == outputs[1]
    assert len(outputs[0].split()) == 3
    assert not set(outputs[0].split()) & set(outputs[2].split())


def test_written_rows_are_read_unchanged(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows: Rows = [{"prompt": "é 漢 \"quoted\"\nline", "ranks": [1, 2]}, {"b": 1, "a": None}]
    write_rows(path, rows)
    assert path.read_bytes().decode() == ('{"prompt": "é 漢 \\"quoted\\"\\nline", "ranks": [1, 2]}\n'
                                          '{"b": 1, "a": null}\n')
    assert list(read_rows(path)) == rows


@pytest.mark.parametrize(("content", "message"), [
    (b'{"a": 1}\n{"a": \n', "rows.jsonl: row 2: not JSON"),
    (b'{"a": 1}\n[1]\n', "row 2: expected an object, found list"),
    (b'{"a": "\xff"}\n', "row 1: not UTF-8 at byte 7"), (None, "no such file")])
def test_a_bad_row_is_an_error_with_file_and_row(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "rows.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=re.escape(message)):
        list(read_rows(path))
