"""Turns a batch's labels into rows for the reward model and reports how far the labelers agree.

    python -m mlops.labeling.to_rows feedback/first           # writes rm.jsonl and agreement.json to the batch's folder
    python -m mlops.labeling.to_rows feedback/first --add     # and the rows to raw/feedback, for the next ingest

rm.jsonl has the reward model's schema, one row per ranking; a ranking of ties only is left out. `--add` writes the
rows that pass the data checks of stage validate, with `--consensus` one row per item, the labelers' mean ranks.
`--adjudicate NAME` makes a batch of the disputed items for one labeler; these decisions then replace all labels of the
item.
"""

import argparse
import math
import tempfile
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from mlops.config.loader import load_params
from mlops.config.paths import FEEDBACK
from mlops.labeling.agreement import Count, agreement, agreement_with, positions
from mlops.labeling.batch import Assignment, Item, assign, read_batch, write_batch
from mlops.labeling.store import LABELS, Label, LabelStore, check
from rlhf.data.schema import KEYS, write_rows
from rlhf.errors import UserError, one_line
from rlhf.files import write_json
from rlhf.params import ValidateParams
from rlhf.world.gold import DATA_SOURCE, gold_labeler

CONSENSUS = "consensus"


def rm_rows(labels: Mapping[tuple[str, str], Label], items: Mapping[str, Item]) -> list[dict[str, Any]]:
    """A row of the reward model's dataset for each ranking that is not ties only, by item and labeler."""
    rows = []
    for (item_id, labeler_id), label in sorted(labels.items()):
        if max(label.ranks) > 1:
            item = items[item_id]
            values = {**item.row, "labeler_id": labeler_id, "completions": list(item.completions),
                      "ranks": list(label.ranks)}
            rows.append({key: values[key] for key in KEYS["rm"]})
    return rows


def consensus_rows(labels: Mapping[tuple[str, str], Label], items: Mapping[str, Item]) -> list[dict[str, Any]]:
    """One row per item: its only ranking, or the ranking by mean rank, with labeler_id "consensus"."""
    by_item: dict[str, list[Label]] = defaultdict(list)
    for (item_id, _), label in sorted(labels.items()):
        by_item[item_id].append(label)
    merged = {}
    for item_id, own in by_item.items():
        sums = [sum(ranks) for ranks in zip(*(label.ranks for label in own), strict=True)]
        order = sorted(set(sums))
        name = own[0].labeler_id if len(own) == 1 else CONSENSUS
        merged[item_id, name] = Label(f"{name}/{item_id}", item_id, name, tuple(order.index(one) + 1 for one in sums))
    return rm_rows(merged, items)


def checked_rows(rows: Sequence[Mapping[str, Any]], limits: ValidateParams
                 ) -> tuple[list[dict[str, Any]], Counter[str]]:
    """(the rows that pass the data checks of stage validate, the number of the others by the rule that they break).

    Rules that only warn leave no row out.
    """
    from mlops.validation.docs import make_context  # Great Expectations, whose import takes seconds
    from mlops.validation.run import validate_files

    plain = [{key: row[key] for key in KEYS["rm"]} for row in rows]
    if not plain:
        return [], Counter()
    with tempfile.TemporaryDirectory(prefix="instructflow-labels-") as folder:
        file = Path(folder) / "rm.jsonl"
        write_rows(file, plain)
        outcome = validate_files(make_context(Path(folder) / "docs"), {"rm": file}, 1.0,
                                 replace(limits, counts="none", mostly={}), say=lambda line: None)
    broken: dict[int, str] = {}
    for finding in outcome.findings:
        for row in finding.rows if finding.stops else ():
            broken.setdefault(row, finding.rule)
    return [row for number, row in enumerate(plain, start=1) if number not in broken], Counter(broken.values())


def gold_ranks(items: Mapping[str, Item], labels: Mapping[tuple[str, str], Label], trusted: str, seed: int
               ) -> dict[str, Sequence[int]]:
    """{item: ranks} to screen labelers against: the trusted labeler's, else the embedded world's gold ones, else none.

    Raises UserError where the trusted labeler has no label.
    """
    if trusted:
        ranks: dict[str, Sequence[int]] = {item_id: label.ranks for (item_id, name), label in labels.items()
                                           if name == trusted}
        if not ranks:
            raise UserError(f"no label by the trusted labeler {trusted}; labelers: "
                            f"{', '.join(sorted({name for _, name in labels}))}")
        return ranks
    gold = gold_labeler(seed) if DATA_SOURCE.exists() else None
    return {name: gold.rank(item.row["prompt"], item.completions) for name, item in items.items()} if gold else {}


def agreement_report(items: Mapping[str, Item], labels: Mapping[tuple[str, str], Label], trusted: str, seed: int,
                     rows: int, assignments: Sequence[Assignment] = ()) -> dict[str, Any]:
    """The content of agreement.json: agreement among the labelers, and of each labeler with the gold ranks; how far
    each labeler's ranks follow the order in which the completions were shown."""
    def record(count: Count) -> dict[str, Any]:
        low, high = count.interval()
        return {"agreement": _number(count.share), "low": low, "high": high, "pairs": count.pairs}

    among = agreement(labels.values(), items)
    with_gold, outliers = agreement_with(gold_ranks(items, labels, trusted, seed),
                                         [label for label in labels.values() if label.labeler_id != trusted])
    leaning, by_position = positions(labels.values(), assignments)
    return {"labels": len(labels), "rows": rows, "alpha": _number(among.alpha), **record(among.overall),
            "agreement_with_ties": _number(among.with_ties.share),
            "by_labeler": {name: record(count) for name, count in among.by_labeler.items()},
            "by_use_case": {name: record(count) for name, count in among.by_use_case.items()},
            "with_gold": {name: record(count) for name, count in with_gold.items()},
            "order_correlation": {name: {"mean": item.mean, "others": item.others, "z": item.z, "rankings": item.rows}
                                  for name, item in leaning.items()},
            "outliers": sorted({*among.outliers, *outliers, *by_position}), "adjudicate": among.adjudicate}


def agreement_metrics(content: Mapping[str, Any]) -> dict[str, float]:
    """Metrics from the content of agreement.json, without those that are undefined (no item with two labels)."""
    metrics = {"labels/count": content["labels"], "labels/alpha": content["alpha"],
             "labels/agreement": content["agreement"], "labels/agreement_low": content["low"],
             "labels/agreement_high": content["high"], "labels/outliers": len(content["outliers"]),
             "labels/adjudicate": len(content["adjudicate"])}
    return {name: value for name, value in metrics.items() if value is not None}


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value


def show(content: Mapping[str, Any], console: Console) -> None:
    """Prints the content of agreement.json as a table."""
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
    console.print(f"outliers: {', '.join(content['outliers']) or 'none'}; items to adjudicate: "
                  f"{len(content['adjudicate'])}")


def add(rows: Sequence[Mapping[str, Any]], name: str) -> str:
    """Writes the rows that pass the data checks to raw/feedback/NAME.jsonl; returns a message."""
    fit, broken = checked_rows(rows, load_params().stages.validate)
    why = ", ".join(f"{rule} {count:,}" for rule, count in sorted(broken.items()))
    if not fit:
        raise UserError(f"none of {len(rows)} rows passes the data checks of stage validate: {why or 'all are ties'}")
    path = FEEDBACK / f"{name}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_rows(path, fit)
    left_out = f"; left out by the data checks: {why}" if why else ""
    return (f"{path}: {len(fit):,} rows of {len(rows):,}{left_out}. Set validate.counts to none and run "
            "`dvc repro data.dvc` for the new data version")


def make_adjudication(folder: Path, item_ids: Sequence[str], labeler: str) -> str:
    """Makes the batch FOLDER-adjudicated of the disputed items, for one labeler to decide; returns a message."""
    target = adjudication_of(folder)
    if (target / "items.jsonl").exists():
        raise UserError(f"{target}: exists already; its labels belong to it")
    items, _ = read_batch(folder)
    disputed = [items[item_id] for item_id in item_ids]
    if not disputed:
        return f"{folder}: nothing to adjudicate"
    write_batch(target, disputed, assign(disputed, [labeler], 0, 1, 0))
    return (f"{target}: {len(disputed)} items for {labeler}; "
            f"`python -m mlops.labeling.terminal {target} --labeler {labeler}`")


def adjudication_of(folder: Path) -> Path:
    """The folder of the batch that decides a batch's disputed items."""
    return folder.with_name(f"{folder.name}-adjudicated")


def with_decisions(folder: Path, labels: Mapping[tuple[str, str], Label]) -> dict[tuple[str, str], Label]:
    """The labels, where those of an adjudicated item are replaced by the decision."""
    decisions = LabelStore(adjudication_of(folder) / LABELS).current()
    item_ids = {item_id for item_id, _ in decisions}
    return {key: label for key, label in labels.items() if key[0] not in item_ids} | decisions


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m mlops.labeling.to_rows",
                                     description="Turns a batch's labels into rows for the reward model.")
    parser.add_argument("folder", type=Path, help="the batch")
    parser.add_argument("--add", action="store_true", help=f"write the rows to {FEEDBACK}, which stage ingest reads")
    parser.add_argument("--consensus", action="store_true",
                        help="with --add: one row per item, the labelers' mean ranks, instead of every ranking")
    parser.add_argument("--gold", default="", metavar="NAME", help="a trusted labeler to screen the others against "
                        "(default: the embedded world's gold labeler, where the data comes from it)")
    parser.add_argument("--adjudicate", default="", metavar="NAME",
                        help="make the batch FOLDER-adjudicated of the disputed items, for NAME to decide")
    options = parser.parse_args()
    messages = []
    with one_line("to_rows"):
        items, assignments = read_batch(options.folder)
        labels = LabelStore(options.folder / LABELS).current()
        if not labels:
            raise UserError(f"{options.folder / LABELS}: no labels yet; `python -m mlops.labeling.terminal` adds them")
        final = with_decisions(options.folder, labels)
        for label in [*labels.values(), *final.values()]:
            check(label, items)
        rows = rm_rows(final, items)
        seed = load_params().seed if DATA_SOURCE.exists() else 0  # the seed of the embedded world
        content = agreement_report(items, labels, options.gold, seed, len(rows), assignments)
        write_rows(options.folder / "rm.jsonl", rows)
        write_json(options.folder / "agreement.json", content)
        if options.adjudicate:
            messages.append(make_adjudication(options.folder, content["adjudicate"], options.adjudicate))
        if options.add:
            messages.append(add(consensus_rows(final, items) if options.consensus else rows, options.folder.name))
    show(content, Console(highlight=False))
    for message in messages:
        print(message)


if __name__ == "__main__":
    main()
