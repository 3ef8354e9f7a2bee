"""Turns a round's labels into rows of the reward model: feedback/<round>/rm.jsonl, with those of the rounds before.

    python -m tasks.rounds.labels --round r2

Labels are checked one by one, the rows by the suites of stage validate. Agreement: feedback/<round>/agreement.json.
"""

import os
from dataclasses import replace
from pathlib import Path

from mlops.labeling.batch import MIN_CHOICES, read_batch
from mlops.labeling.store import LABELS, LabelStore, check
from mlops.labeling.to_rows import agreement_metrics, agreement_report, rm_rows
from mlops.validation.docs import make_context
from mlops.validation.run import validate_files
from rlhf.data.schema import read_rows, write_rows
from rlhf.errors import UserError
from rlhf.files import write_json
from rlhf.params import Profile
from tasks.stage import Stage, run_stage
from tasks.validate import report as stop_at

EXPECTED = ("characters",)  # says nothing against labels: a model may write anything


def ingest(stage: Stage) -> None:
    """Writes the rows and the agreement of a round."""
    folder, start, rounds = Path("feedback") / stage.key, stage.round, stage.params.stages.rounds
    items, assignments = read_batch(folder)
    labels = LabelStore(folder / LABELS).current()
    wanted = {(item.item_id, item.labeler_id) for item in assignments}
    if missing := sorted(wanted - set(labels)):
        item, labeler = missing[0]
        raise UserError(f"{folder / LABELS}: {len(missing)} of {len(wanted)} labels are missing, first: {item} by "
                        f"{labeler}; `python -m mlops.labeling.terminal {folder} --labeler {labeler}`")
    for label in labels.values():
        check(label, items)
    rows = rm_rows(labels, items)
    earlier = [row for row in read_rows(Path(start.rows)) if start.number > 1 or rounds.with_data
               or row["split"] == "valid"]
    write_rows(stage.scratch / "new.jsonl", rows)
    validate_rows(stage.scratch / "new.jsonl", stage.params.stages, stage.scratch)
    write_rows(stage.scratch / "rm.jsonl", [*earlier, *rows])
    content = agreement_report(items, labels, rounds.trusted, stage.params.seed, len(rows), assignments)
    write_json(stage.scratch / "agreement.json", content)
    for name in ("rm.jsonl", "agreement.json"):
        stage.publish(name, f"feedback/{stage.key}/{name}")
    stage.finish({"labels/rows": len(rows), "labels/rows_so_far": len(rows) + sum(
        row["split"] == "train" for row in earlier), **agreement_metrics(content)},
                 [f"feedback/{stage.key}/agreement.json"])


def validate_rows(file: Path, stages: Profile, scratch: Path) -> None:
    """The suites over the rows that people have just made. Raises UserError where a rule fails that stops the run."""
    given = stages.validate
    limits = replace(given, counts="none", min_k=MIN_CHOICES, warn=[*given.warn, *EXPECTED])
    outcome = validate_files(make_context(scratch / "docs"), {"rm": Path(os.path.relpath(file))}, 1.0, limits)
    stop_at(outcome.findings)


if __name__ == "__main__":
    run_stage("round_labels", ingest, of_a_round=True)
