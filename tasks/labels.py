"""Reads a batch's labels: rows for the reward model, and how far the labelers agree.

    python -m tasks.labels feedback/first

Writes rm.jsonl (the reward model's schema, a row for each labeler's ranking) and agreement.json into the batch's
folder. Rankings that prefer nothing are left out. `python -m tasks.validate` checks the rows like any others.
"""

import argparse
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from rlhf.data.schema import KEYS, write_rows
from rlhf.errors import UserError
from rlhf.feedback.agreement import Agreement, Count, agreement
from rlhf.feedback.batch import Item, read_batch
from rlhf.feedback.store import Label, LabelStore, check
from rlhf.files import write_json
from tasks.label import LABELS


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


def report(found: Agreement, labels: int, rows: int) -> dict[str, Any]:
    """agreement.json."""
    def shown(count: Count) -> dict[str, Any]:
        low, high = count.interval()
        return {"agreement": _number(count.share), "low": low, "high": high, "pairs": count.pairs}

    return {"labels": labels, "rows": rows, "alpha": _number(found.alpha), **shown(found.overall),
            "by_labeler": {name: shown(count) for name, count in found.by_labeler.items()},
            "by_use_case": {name: shown(count) for name, count in found.by_use_case.items()},
            "outliers": found.outliers, "adjudicate": found.adjudicate}


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value


def show(content: Mapping[str, Any], console: Console) -> None:
    table = Table("", "agreement", "95 %", "pairs", show_edge=False)
    rows = [("all", content), *content["by_labeler"].items(), *content["by_use_case"].items()]
    for name, item in rows:
        share = "–" if item["agreement"] is None else f"{item['agreement']:.3f}"
        table.add_row(name, share, f"{item['low']:.3f} to {item['high']:.3f}", f"{item['pairs']:,}",
                      style="bold" if name == "all" else "red" if name in content["outliers"] else "")
    console.print(table)
    alpha = "– (no item with two labels)" if content["alpha"] is None else f"{content['alpha']:.3f}"
    console.print(f"Krippendorff's alpha {alpha}; {content['labels']:,} labels, {content['rows']:,} rows")
    console.print(f"outliers: {', '.join(content['outliers']) or 'none'}; items to look at again: "
                  f"{len(content['adjudicate'])}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tasks.labels", description="Reads a batch's labels.")
    parser.add_argument("folder", type=Path, help="the batch")
    options = parser.parse_args()
    try:
        items, _ = read_batch(options.folder)
        labels = LabelStore(options.folder / LABELS).current()
        if not labels:
            raise UserError(f"{options.folder / LABELS}: no labels yet; `python -m tasks.label` makes them")
        for label in labels.values():
            check(label, items)
        rows = rm_rows(labels, items)
        content = report(agreement(labels.values(), items), len(labels), len(rows))
        write_rows(options.folder / "rm.jsonl", rows)
        write_json(options.folder / "agreement.json", content)
    except UserError as error:
        print(f"labels: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    show(content, Console(highlight=False))


if __name__ == "__main__":
    main()
