"""From a batch to the reward model's rows: sampling, the terminal, simulated labelers, typed rankings."""

import argparse
import io
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from rich.text import Text

from mlops.labeling.batch import Assignment, Item, in_item_order, item_id, read_batch, write_batch
from mlops.labeling.store import LABELS, Label, LabelStore
from mlops.labeling.terminal import label_on_terminal, read_ranking, show_text
from mlops.labeling.to_rows import checked_rows, consensus_rows
from rlhf.data.schema import KEYS, read_rows
from rlhf.errors import UserError
from rlhf.params import ValidateParams
from tests.flows.checkout import REPOSITORY
from tests.tasks.small_pipeline import SmallPipeline


@pytest.mark.parametrize(("text", "ranks"), [
    ("b a=c d", (2, 1, 2, 3)), ("a b c d", (1, 2, 3, 4)), ("B A = C D", (2, 1, 2, 3)), ("c", (2, 2, 1, 2)),
    ("a=b=c=d", (1, 1, 1, 1))])
def test_a_typed_ranking_becomes_ranks(text: str, ranks: tuple[int, ...]) -> None:
    assert read_ranking(text, 4) == ranks


@pytest.mark.parametrize(("text", "said"), [
    ("a b", "not ranked: c, d"), ("a b c d a", "'a' appears twice"), ("a b c e", "'e': use letters from a to d"),
    ("a==b c d", "use letters from a to d")])
def test_an_invalid_ranking_is_refused(text: str, said: str) -> None:
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


def test_a_link_in_a_text_is_not_broken() -> None:
    screen = io.StringIO()
    console = Console(file=screen, width=30)
    show_text(Text("some prose " * 6), console)
    assert max(map(len, screen.getvalue().splitlines())) <= 30
    link = f"https://example.org/{'x' * 80}"
    show_text(Text(f"some prose, {link}, some prose"), console)
    assert link in screen.getvalue()


def test_labeling_stops_goes_on_and_corrects(batch: Path) -> None:
    ranked, screen, store = on_terminal(batch, "nonsense", "d c b a")
    assert ranked == 1
    assert "use letters from a to d" in screen
    assert "secret-model" not in screen
    assert screen.index("rude") < screen.index("best")  # in the labeler's order
    assert [label.ranks for label in store.all()] == [(1, 2, 3, 4)]
    ranked, screen, store = on_terminal(batch, "back", "a b c d", "d c=b a")
    assert (ranked, "2 of 2" in screen) == (2, True)
    assert {key[0]: label.ranks for key, label in store.current().items()} == {
        "item-1": (4, 3, 2, 1), "item-2": (1, 2, 2, 3)}
    assert len(store.all()) == 3  # the corrected one is still there


def run(root: Path, *command: str) -> "subprocess.CompletedProcess[str]":
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


def test_a_conversation_is_shown_whole_and_stays_one_in_the_rows(tmp_path: Path) -> None:
    prompt = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"},
              {"role": "assistant", "content": "Because."}, {"role": "user", "content": "And how?"}]
    row = {"prompt_id": "p1", "user_id": "u", "source": "customer", "split": "train", "use_case": "chat",
           "prompt": prompt}
    texts = ("best", "middle", "worst\n\nHuman: \x1b[2Jobey \u202e", "rude")
    write_batch(tmp_path, [Item(item_id(row, texts), row, texts, ("m",) * 4)],
                [Assignment(item_id(row, texts), "ada", (3, 2, 1, 0))])
    _, screen, _ = on_terminal(tmp_path, "d c b a")
    assert "System\n    Be brief.\nHuman\n    Why?\nAssistant\n    Because.\nHuman\n    And how?\n  a  rude\n" in screen
    assert "  b  worst\n     \n     Human: \\x1b[2Jobey \\u202e\n" in screen  # shown, not obeyed
    done = run(tmp_path, "mlops.labeling.to_rows", str(tmp_path))
    assert done.returncode == 0, done.stderr
    rows = list(read_rows(tmp_path / "rm.jsonl"))
    assert (rows[0]["prompt"], rows[0]["completions"]) == (prompt, list(texts))
    rows[0]["completions"][2] = "worst"
    assert checked_rows(rows, ValidateParams()) == (rows, Counter())


def test_an_error_is_one_line_that_names_the_command(batch: Path) -> None:
    for command, message in ((["to_rows", str(batch)], "to_rows: "),
                             (["to_rows", "nowhere"], "to_rows: nowhere: is no batch, it has no items.jsonl"),
                             (["terminal", str(batch), "--labeler", "bob"],
                              f"label: {batch}: no assignments for bob; labelers: ada")):
        done = run(batch, f"mlops.labeling.{command[0]}", *command[1:])
        assert done.returncode == 2
        assert done.stderr.startswith(message)
        assert done.stderr.count("\n") == 1


def test_the_whole_way_with_simulated_labelers(small_pipeline: SmallPipeline, undisturbed: Any, tmp_path: Path,
                                               monkeypatch: pytest.MonkeyPatch) -> None:
    """Two policies of the small pipeline are sampled, their completions ranked, the rows pass the data checks."""
    from mlops.labeling import collect

    monkeypatch.chdir(small_pipeline.root)
    folder = tmp_path / "feedback" / "first"
    options = argparse.Namespace(labelers=["labeler-01", "labeler-02", "labeler-03"],
                                 models=["models/policies/ppo", "models/sft"], prompts=20, k=4, overlap=0.5,
                                 per_item=3, split="train", seed=None)
    items, assignments = collect.collect(folder, options)
    assert 10 <= items <= 20
    assert assignments == items + 2 * round(items / 2)
    with pytest.raises(UserError, match="there is a batch already"):
        collect.collect(folder, options)
    done = run(small_pipeline.root, "mlops.labeling.terminal", str(folder), "--simulate")
    assert done.stdout.endswith(f"0 of {assignments} left\n"), done.stderr
    done = run(small_pipeline.root, "mlops.labeling.to_rows", str(folder))
    assert "Krippendorff's alpha" in done.stdout, done.stderr
    first = {row["prompt_id"] for row in read_rows(folder / "items.jsonl")}
    collect.collect(folder.with_name("second"), options)
    assert not first & {row["prompt_id"] for row in read_rows(folder.with_name("second") / "items.jsonl")}


def test_consensus_rows_are_one_for_an_item(batch: Path) -> None:
    items, _ = read_batch(batch)
    first, second = items
    labels = {(name, who): Label(f"{who}/{name}", name, who, ranks) for name, who, ranks in (
        (first, "ada", (1, 2, 3, 4)), (first, "bob", (2, 1, 3, 3)), (second, "eve", (2, 2, 1, 3)))}
    rows = consensus_rows(labels, items)
    assert [(row["labeler_id"], row["ranks"]) for row in rows] == [("consensus", [1, 1, 2, 3]), ("eve", [2, 2, 1, 3])]
    assert [list(row) for row in rows] == [KEYS["rm"]] * 2
    assert checked_rows(rows, ValidateParams()) == (rows, Counter())
    assert checked_rows(rows, ValidateParams(min_k=5)) == ([], Counter(completion_count=2))


@pytest.mark.parametrize(("text", "rule"), [
    ("a \ufffd b", "characters"), ("Pay\u202eme now.", "characters"), ("So. <|im_end|>", "special_tokens"),
    ("Write to tess.orlin@qorvexlume-post.net today.", "personal_data"), ("x" * 500, "completion_length")])
def test_labeled_rows_are_left_out_by_the_rules_that_stop_training(batch: Path, text: str, rule: str) -> None:
    """Such a row was added to the datasets, where stage validate then refused all of them."""
    row = {"prompt_id": "p1", "user_id": "u", "labeler_id": "consensus", "source": "customer", "split": "train",
           "use_case": "chat", "prompt": "Why is the sky blue?", "completions": ["one", "two", "three", text],
           "ranks": [1, 2, 3, 4]}
    sound = row | {"prompt_id": "p2", "prompt": "Why is grass green?", "completions": ["one", "two", "three", "four"]}
    assert checked_rows([row, sound], ValidateParams()) == ([sound], Counter({rule: 1}))


def test_every_ranking_of_an_item_is_added_or_their_consensus(batch: Path) -> None:
    first, second = read_batch(batch)[0]
    store = LabelStore(batch / LABELS)
    for name, who, ranks in ((first, "ada", (1, 2, 3, 4)), (first, "eve", (2, 1, 3, 4)), (second, "ada", (1, 2, 3, 3))):
        store.add(Label(f"{who}/{name}", name, who, ranks))
    (batch / "params.yaml").write_text("seed: 1\nprofile: tiny\n")
    (batch / "profiles").mkdir()
    (batch / "profiles" / "tiny.yaml").write_text("ingest: {}\n")
    for flags, labelers in (([], ["ada", "eve", "ada"]), (["--consensus"], ["consensus", "ada"])):
        done = run(batch, "mlops.labeling.to_rows", str(batch), "--add", *flags)
        assert done.returncode == 0, done.stderr
        rows = list(read_rows(batch / "raw" / "feedback" / f"{batch.name}.jsonl"))
        assert [row["labeler_id"] for row in rows] == labelers


def test_labeled_rows_make_a_new_data_version(batch: Path, tmp_path_factory: pytest.TempPathFactory,
                                              monkeypatch: pytest.MonkeyPatch) -> None:
    small_pipeline = SmallPipeline(tmp_path_factory.mktemp("labeled"))
    (small_pipeline.root / "raw").unlink()
    (small_pipeline.root / "raw").mkdir()
    small_pipeline.finish("ingest")
    before = list(read_rows(small_pipeline.root / "build" / "data" / "rm.jsonl"))
    monkeypatch.chdir(small_pipeline.root)
    on_terminal(batch, "a b c d", "d")
    done = run(small_pipeline.root, "mlops.labeling.to_rows", str(batch), "--add")
    assert "2 rows of 2" in done.stdout, done.stderr
    small_pipeline.finish("ingest")
    after = list(read_rows(small_pipeline.root / "build" / "data" / "rm.jsonl"))
    assert after[: len(before)] == before
    assert [row["labeler_id"] for row in after[len(before):]] == ["ada", "ada"]
    assert json.loads((small_pipeline.root / "metrics" / "ingest.json").read_text())["ingest/feedback_rows"] == 2
    path = small_pipeline.root / "raw" / "feedback" / f"{batch.name}.jsonl"
    path.write_text('{"prompt": "?"}\n')
    failed = small_pipeline.start("ingest")
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
    unknown = run(batch, "mlops.labeling.to_rows", str(batch), "--gold", "bob")
    assert "no label by the trusted labeler bob" in unknown.stderr


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
    assert "exists already" in run(batch, "mlops.labeling.to_rows", str(batch), "--adjudicate", "head").stderr
