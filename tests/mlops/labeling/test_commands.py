"""From a batch to the reward model's rows: sampling, the terminal, simulated labelers, what a labeler types."""

import argparse
import io
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from mlops.labeling.batch import Assignment, Item, in_item_order, read_batch, write_batch
from mlops.labeling.store import LABELS, Label, LabelStore
from mlops.labeling.terminal import label_on_terminal, read_ranking
from mlops.labeling.to_rows import consensus_rows, fit_for_data
from rlhf.data.schema import KEYS, read_rows
from rlhf.errors import UserError
from tests.flows.checkout import REPOSITORY
from tests.tasks.small_pipeline import Line


@pytest.mark.parametrize(("text", "ranks"), [
    ("b a=c d", (2, 1, 2, 3)), ("a b c d", (1, 2, 3, 4)), ("B A = C D", (2, 1, 2, 3)), ("c", (2, 2, 1, 2)),
    ("a=b=c=d", (1, 1, 1, 1))])
def test_what_a_labeler_types(text: str, ranks: tuple[int, ...]) -> None:
    assert read_ranking(text, 4) == ranks


@pytest.mark.parametrize(("text", "said"), [
    ("a b", "not ranked: c, d"), ("a b c d a", "'a' is there twice"), ("a b c e", "'e': letters from a to d"),
    ("a==b c d", "letters from a to d")])
def test_what_cannot_be_a_ranking(text: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        read_ranking(text, 4)


def test_ranks_go_back_to_the_item_s_order() -> None:
    # shown third first: the best as shown (1) is the item's third completion
    assert in_item_order((1, 2, 3), (2, 0, 1)) == (2, 3, 1)


@pytest.fixture
def batch(tmp_path: Path) -> Path:
    row = {"user_id": "u", "source": "customer", "split": "train", "use_case": "chat", "prompt": "Why?"}
    items = [Item(f"item-{number}", {"prompt_id": f"p{number}", **row}, ("best", "middle", "worst", "rude"),
                  ("secret-model",) * 4) for number in (1, 2)]
    write_batch(tmp_path, items, [Assignment(item.item_id, "ada", (3, 2, 1, 0)) for item in items])
    return tmp_path


def on_terminal(batch: Path, *answers: str) -> tuple[int, str, LabelStore]:
    items, assignments = read_batch(batch)
    said: Iterator[str] = iter([*answers, ""])
    screen, store = io.StringIO(), LabelStore(batch / LABELS)
    ranked = label_on_terminal(store, items, assignments, Console(file=screen, width=100), lambda question: next(said))
    return ranked, screen.getvalue(), store


def test_labeling_stops_goes_on_and_corrects(batch: Path) -> None:
    ranked, screen, store = on_terminal(batch, "nonsense", "d c b a")
    assert ranked == 1
    assert "letters from a to d" in screen
    assert "secret-model" not in screen
    assert screen.index("rude") < screen.index("best")  # in the labeler's order
    assert [label.ranks for label in store.all()] == [(1, 2, 3, 4)]
    ranked, screen, store = on_terminal(batch, "back", "a b c d", "d c=b a")
    assert (ranked, "2 of 2" in screen) == (2, True)
    assert {key[0]: label.ranks for key, label in store.current().items()} == {
        "item-1": (4, 3, 2, 1), "item-2": (1, 2, 2, 3)}
    assert len(store.all()) == 3  # the corrected one is still there


def run(root: Path, *command: str) -> "subprocess.CompletedProcess[str]":
    import os

    return subprocess.run([sys.executable, "-m", *command], cwd=root, capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(REPOSITORY)})


def test_labels_become_rows_and_agreement(batch: Path) -> None:
    on_terminal(batch, "d c b a", "a=b=c=d")
    done = run(batch, "mlops.labeling.to_rows", str(batch))
    assert done.returncode == 0, done.stderr
    rows = list(read_rows(batch / "rm.jsonl"))
    assert [list(row) for row in rows] == [KEYS["rm"]]  # a ranking that prefers nothing is no row
    assert (rows[0]["labeler_id"], rows[0]["completions"], rows[0]["ranks"]) == (
        "ada", ["best", "middle", "worst", "rude"], [1, 2, 3, 4])
    found = json.loads((batch / "agreement.json").read_text())
    assert (found["labels"], found["rows"], found["alpha"]) == (2, 1, None)


def test_mistakes_are_one_line(batch: Path) -> None:
    for command, said in ((["labels", str(batch)], "no labels yet"),
                          (["labels", "nowhere"], "nowhere/items.jsonl: no such file"),
                          (["label", str(batch), "--labeler", "bob"], "nothing is assigned to bob; labelers: ada")):
        done = run(batch, f"tasks.{command[0]}", *command[1:])
        assert done.returncode == 2
        assert said in done.stderr
        assert "Traceback" not in done.stderr


def test_the_whole_way_with_simulated_labelers(line: Line, undisturbed: Any, tmp_path: Path,
                                               monkeypatch: pytest.MonkeyPatch) -> None:
    """Two policies of the small line are sampled, their completions ranked, the rows pass the data checks."""
    from mlops.labeling import collect

    monkeypatch.chdir(line.root)
    folder = tmp_path / "feedback" / "first"
    options = argparse.Namespace(labelers=["labeler-01", "labeler-02", "labeler-03"],
                                 models=["models/ppo", "models/sft"], prompts=20, k=4, overlap=0.5,
                                 per_item=3, split="train", seed=None)
    items, assignments = collect.collect(folder, options)
    assert 10 <= items <= 20
    assert assignments == items + 2 * round(items / 2)
    with pytest.raises(UserError, match="there is a batch already"):
        collect.collect(folder, options)
    assert run(line.root, "mlops.labeling.terminal", str(folder), "--simulate").stdout.endswith(f"0 of {assignments} left\n")
    done = run(line.root, "mlops.labeling.to_rows", str(folder))
    assert "Krippendorff's alpha" in done.stdout, done.stderr
    first = {row["prompt_id"] for row in read_rows(folder / "items.jsonl")}
    collect.collect(folder.with_name("second"), options)
    assert not first & {row["prompt_id"] for row in read_rows(folder.with_name("second") / "items.jsonl")}


def test_rows_for_the_datasets_have_each_prompt_once(batch: Path) -> None:
    items, _ = read_batch(batch)
    (first, second), broken = items, "\ufffd"
    labels = {(name, who): Label(f"{who}/{name}", name, who, ranks) for name, who, ranks in (
        (first, "ada", (1, 2, 3, 4)), (first, "bob", (2, 1, 3, 3)), (second, "eve", (2, 2, 1, 3)))}
    rows = consensus_rows(labels, items)
    assert [(row["labeler_id"], row["ranks"]) for row in rows] == [("consensus", [1, 1, 2, 3]), ("eve", [2, 2, 1, 3])]
    assert [list(row) for row in rows] == [KEYS["rm"]] * 2
    assert fit_for_data(rows[0], 4)
    assert not fit_for_data(rows[0], 5)
    assert not fit_for_data({"completions": ["a", "b", broken, "d"]}, 4)


def test_labeled_rows_make_a_new_data_version(batch: Path, tmp_path_factory: pytest.TempPathFactory,
                                              monkeypatch: pytest.MonkeyPatch) -> None:
    line = Line(tmp_path_factory.mktemp("labeled"))
    (line.root / "raw").unlink()
    (line.root / "raw").mkdir()
    line.finish("ingest")
    before = list(read_rows(line.root / "build" / "data" / "rm.jsonl"))
    monkeypatch.chdir(line.root)
    on_terminal(batch, "a b c d", "d")
    done = run(line.root, "mlops.labeling.to_rows", str(batch), "--add")
    assert "2 rows of 2" in done.stdout, done.stderr
    line.finish("ingest")
    after = list(read_rows(line.root / "build" / "data" / "rm.jsonl"))
    assert after[: len(before)] == before
    assert [row["labeler_id"] for row in after[len(before):]] == ["ada", "ada"]
    assert json.loads((line.root / "metrics" / "ingest.json").read_text())["ingest/feedback_rows"] == 2
    path = line.root / "raw" / "feedback" / f"{batch.name}.jsonl"
    path.write_text('{"prompt": "?"}\n')
    failed = line.start("ingest")
    assert f"{path}: row 1: expected the keys prompt_id" in failed.communicate()[1]
    assert failed.returncode == 2


def test_labelers_are_screened_against_a_trusted_one(batch: Path) -> None:
    items, _ = read_batch(batch)
    store = LabelStore(batch / LABELS)
    for name in items:
        for who, ranks in (("head", (1, 2, 3, 4)), ("ada", (1, 2, 4, 3)), ("eve", (4, 3, 2, 1))):
            store.add(Label(f"{who}/{name}", name, who, ranks))
    done = run(batch, "mlops.labeling.to_rows", str(batch), "--gold", "head")
    assert "ada with gold" in done.stdout, done.stderr
    content = json.loads((batch / "agreement.json").read_text())
    assert {name: (count["agreement"], count["pairs"]) for name, count in content["with_gold"].items()} == {
        "ada": (pytest.approx(5 / 6), 12), "eve": (0, 12)}
    assert "eve" in content["outliers"]
    assert "no label by bob" in run(batch, "mlops.labeling.to_rows", str(batch), "--gold", "bob").stderr


def test_what_labelers_disagree_on_is_decided(batch: Path) -> None:
    first, second = read_batch(batch)[0]
    store = LabelStore(batch / LABELS)
    for name, who, ranks in ((first, "ada", (1, 2, 3, 4)), (first, "eve", (4, 3, 2, 1)),
                             (second, "ada", (1, 2, 3, 4)), (second, "eve", (1, 2, 4, 3))):
        store.add(Label(f"{who}/{name}", name, who, ranks))
    done = run(batch, "mlops.labeling.to_rows", str(batch), "--adjudicate", "head")
    target = batch.with_name(f"{batch.name}-adjudicated")
    assert f"{target}: 1 items for head" in done.stdout, done.stderr
    assert [(item.item_id, item.labeler_id) for item in read_batch(target)[1]] == [(first, "head")]
    on_terminal(target, "a b c d")
    run(batch, "mlops.labeling.to_rows", str(batch))
    rows = [(row["labeler_id"], row["prompt_id"]) for row in read_rows(batch / "rm.jsonl")]
    assert rows == [("head", "p1"), ("ada", "p2"), ("eve", "p2")]
    assert "is there already" in run(batch, "mlops.labeling.to_rows", str(batch), "--adjudicate", "head").stderr
