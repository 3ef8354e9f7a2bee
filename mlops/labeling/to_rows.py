"""Reads a batch's labels: rows for the reward model, and how far the labelers agree.

    python -m mlops.labeling.to_rows feedback/first           rm.jsonl and agreement.json in the batch's folder
    python -m mlops.labeling.to_rows feedback/first --add     and the rows into the datasets: the next ingest makes a new version

rm.jsonl has the reward model's schema, a row for each labeler's ranking; rankings that prefer nothing are left out. The
datasets have each prompt once: there several labelers' rankings of an item become one. `--adjudicate NAME` has somebody
decide the items that labelers disagree on; the decision then stands for the item.
"""

import argparse
import math
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from mlops.config.loader import load_params
from mlops.config.paths import FEEDBACK
from mlops.labeling.agreement import Agreement, Count, against, agreement
from mlops.labeling.batch import Item, assign, read_batch, write_batch
from mlops.labeling.store import LABELS, Label, LabelStore, check
from rlhf.curation.characters import odd_character
from rlhf.data.schema import KEYS, write_rows
from rlhf.errors import UserError
from rlhf.files import write_json
from rlhf.world.gold import SOURCE, gold_labeler

CONSENSUS = "consensus"


def rm_rows(labels: Mapping[tuple[str, str], Label], items: Mapping[str, Item]) -> list[dict[str, Any]]:
    """A row of the reward model's dataset for each ranking that prefers something, by item and labeler."""
    rows = []
    for (item_id, labeler_id), label in sorted(labels.items()):
        if max(label.ranks) > 1:
            item = items[item_id]
            values = {**item.row, "labeler_id": labeler_id, "completions": list(item.completions),
                      "ranks": list(label.ranks)}
            rows.append({key: values[key] for key in KEYS["rm"]})
    return rows


def consensus_rows(labels: Mapping[tuple[str, str], Label], items: Mapping[str, Item]) -> list[dict[str, Any]]:
    """One row for each item: its only ranking, or that of the labelers' mean ranks, by labeler "consensus"."""
    by_item: dict[str, list[Label]] = defaultdict(list)
    for (item_id, _), label in sorted(labels.items()):
        by_item[item_id].append(label)
    merged = {}
    for item_id, found in by_item.items():
        sums = [sum(ranks) for ranks in zip(*(label.ranks for label in found), strict=True)]
        places = sorted(set(sums))
        name = found[0].labeler_id if len(found) == 1 else CONSENSUS
        merged[item_id, name] = Label(f"{name}/{item_id}", item_id, name, tuple(places.index(one) + 1 for one in sums))
    return rm_rows(merged, items)


def fit_for_data(row: Mapping[str, Any], min_k: int) -> bool:
    """Whether the datasets take the row: enough completions, and none that a broken tokenizer wrote."""
    return len(row["completions"]) >= min_k and not any(map(odd_character, row["completions"]))


def truth_of(items: Mapping[str, Item], labels: Mapping[tuple[str, str], Label], trusted: str, seed: int
             ) -> dict[str, Sequence[int]]:
    """What labelers are screened against: a trusted one's rankings, else the embedded world's gold ones, else nothing.

    Raises UserError where the trusted one has labeled nothing.
    """
    if trusted:
        found = {item_id: label.ranks for (item_id, name), label in labels.items() if name == trusted}
        if not found:
            raise UserError(f"no label by {trusted}, whom the others are to be screened against; labelers: "
                            f"{', '.join(sorted({name for _, name in labels}))}")
        return dict(found)
    gold = gold_labeler(seed) if SOURCE.exists() else None
    return {name: gold.rank(str(item.row["prompt"]), item.completions) for name, item in items.items()} if gold else {}


def agreed_on(items: Mapping[str, Item], labels: Mapping[tuple[str, str], Label], trusted: str, seed: int, rows: int
              ) -> dict[str, Any]:
    """agreement.json: among the labelers, and of each with what is known."""
    truth = truth_of(items, labels, trusted, seed)
    with_truth, outliers = against([label for label in labels.values() if label.labeler_id != trusted], truth)
    return report(agreement(labels.values(), items), len(labels), rows, with_truth, outliers)


def report(found: Agreement, labels: int, rows: int, with_truth: Mapping[str, Count], outliers: Sequence[str]
           ) -> dict[str, Any]:
    """agreement.json."""
    def shown(count: Count) -> dict[str, Any]:
        low, high = count.interval()
        return {"agreement": _number(count.share), "low": low, "high": high, "pairs": count.pairs}

    return {"labels": labels, "rows": rows, "alpha": _number(found.alpha), **shown(found.overall),
            "by_labeler": {name: shown(count) for name, count in found.by_labeler.items()},
            "by_use_case": {name: shown(count) for name, count in found.by_use_case.items()},
            "with_gold": {name: shown(count) for name, count in with_truth.items()},
            "outliers": sorted({*found.outliers, *outliers}), "adjudicate": found.adjudicate}


def numbers_of(content: Mapping[str, Any]) -> dict[str, float]:
    """The report's main numbers as metrics; what nobody can know (no item with two labels) is left out."""
    found = {"labels/count": content["labels"], "labels/alpha": content["alpha"],
             "labels/agreement": content["agreement"], "labels/agreement_low": content["low"],
             "labels/agreement_high": content["high"], "labels/outliers": len(content["outliers"]),
             "labels/adjudicate": len(content["adjudicate"])}
    return {name: value for name, value in found.items() if value is not None}


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value


def show(content: Mapping[str, Any], console: Console) -> None:
    table = Table("", "agreement", "95 %", "pairs", show_edge=False)
    rows = [("all", content), *content["by_labeler"].items(), *content["by_use_case"].items(),
            *((f"{name} with gold", item) for name, item in content["with_gold"].items())]
    for name, item in rows:
        share = "–" if item["agreement"] is None else f"{item['agreement']:.3f}"
        style = "bold" if name == "all" else "red" if name.split(" with ")[0] in content["outliers"] else ""
        table.add_row(name, share, f"{item['low']:.3f} to {item['high']:.3f}", f"{item['pairs']:,}", style=style)
    console.print(table)
    alpha = "– (no item with two labels)" if content["alpha"] is None else f"{content['alpha']:.3f}"
    console.print(f"Krippendorff's alpha {alpha}; {content['labels']:,} labels, {content['rows']:,} rows")
    console.print(f"outliers: {', '.join(content['outliers']) or 'none'}; items to look at again: "
                  f"{len(content['adjudicate'])}")


def add(rows: Sequence[Mapping[str, Any]], name: str) -> str:
    """Writes the rows that fit to raw/feedback/NAME.jsonl; says how many, and what to do next."""
    min_k = load_params().stages.validate.min_k
    fit = [dict(row) for row in rows if fit_for_data(row, min_k)]
    if not fit:
        raise UserError(f"none of {len(rows)} rows has {min_k} completions (validate.min_k) of whole characters")
    path = FEEDBACK / f"{name}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_rows(path, fit)
    return (f"{path}: {len(fit):,} rows of {len(rows):,}; the others have fewer than {min_k} completions or broken "
            "characters. `dvc repro data.dvc` makes the new version; validate.counts must be none")


def queue(folder: Path, names: Sequence[str], labeler: str) -> str:
    """Makes FOLDER-adjudicated: the items that labelers disagree on, for one labeler to decide; says how many."""
    target = decisions_of(folder)
    if (target / "items.jsonl").exists():
        raise UserError(f"{target}: is there already; its labels belong to it")
    items, _ = read_batch(folder)
    wanted = [items[name] for name in names]
    if not wanted:
        return f"{folder}: nothing to adjudicate"
    write_batch(target, wanted, assign(wanted, [labeler], 0, 1, 0))
    return f"{target}: {len(wanted)} items for {labeler}; `python -m mlops.labeling.terminal {target} --labeler {labeler}`"


def decisions_of(folder: Path) -> Path:
    """The batch in which a batch's disputed items are decided."""
    return folder.with_name(f"{folder.name}-adjudicated")


def decided(folder: Path, labels: Mapping[tuple[str, str], Label]) -> dict[tuple[str, str], Label]:
    """The labels, but of an item that was adjudicated only that decision."""
    found = LabelStore(decisions_of(folder) / LABELS).current()
    names = {name for name, _ in found}
    return {key: label for key, label in labels.items() if key[0] not in names} | found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m mlops.labeling.to_rows", description="Reads a batch's labels.")
    parser.add_argument("folder", type=Path, help="the batch")
    parser.add_argument("--add", action="store_true", help=f"write the rows to {FEEDBACK}, which ingest reads")
    parser.add_argument("--gold", default="", metavar="NAME", help="a trusted labeler to screen the others against; "
                        "without, the embedded world's gold labeler where the data is its")
    parser.add_argument("--adjudicate", default="", metavar="NAME",
                        help="make FOLDER-adjudicated: what labelers disagree on, for NAME to decide")
    options = parser.parse_args()
    said = []
    try:
        items, _ = read_batch(options.folder)
        labels = LabelStore(options.folder / LABELS).current()
        if not labels:
            raise UserError(f"{options.folder / LABELS}: no labels yet; `python -m mlops.labeling.terminal` makes them")
        final = decided(options.folder, labels)
        for label in [*labels.values(), *final.values()]:
            check(label, items)
        rows = rm_rows(final, items)
        seed = load_params().seed if SOURCE.exists() else 0  # of the embedded world
        content = agreed_on(items, labels, options.gold, seed, len(rows))
        write_rows(options.folder / "rm.jsonl", rows)
        write_json(options.folder / "agreement.json", content)
        if options.adjudicate:
            said.append(queue(options.folder, content["adjudicate"], options.adjudicate))
        if options.add:
            said.append(add(consensus_rows(final, items), options.folder.name))
    except UserError as error:
        print(f"labels: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    show(content, Console(highlight=False))
    for line in said:
        print(line)


if __name__ == "__main__":
    main()
