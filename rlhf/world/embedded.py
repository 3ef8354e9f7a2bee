"""Writes the embedded source: the three datasets, the pretraining corpus, the tax tasks."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from rlhf.data.schema import PAPER_ROWS, expected_rows, write_rows
from rlhf.files import write_atomic, write_json
from rlhf.params import IngestParams
from rlhf.training.progress import StageProgress
from rlhf.world.corpus import documents
from rlhf.world.datasets import ppo_rows, rm_rows, sft_rows
from rlhf.world.facts import World
from rlhf.world.gold import SOURCE
from rlhf.world.tax import TASKS, task_yaml, tax_items


def write_embedded(params: IngestParams, seed: int, folder: Path) -> dict[str, Any]:
    """Writes sft.jsonl, rm.jsonl, ppo.jsonl, corpus.jsonl, tax/ and source.json into `folder`; returns the metrics."""
    world = World(seed)
    rows = {name: sum(expected_rows(name, params.scale).values()) for name in PAPER_ROWS}
    total = sum(rows.values()) + params.corpus_documents
    writers = {"sft": sft_rows, "rm": rm_rows, "ppo": ppo_rows}
    valid_prompts: set[str] = set()
    with StageProgress("ingest", total, "rows") as progress:

        def counted(items: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
            for item in items:
                if item.get("split") == "valid":
                    valid_prompts.add(item["prompt"])
                yield item
                progress.step()

        for name, writer in writers.items():
            write_rows(folder / f"{name}.jsonl", counted(writer(world, params.scale)))
        held_out = {"forum": valid_prompts}
        for task in TASKS:
            items = tax_items(world, task, params.tax_items)
            held_out[task] = {item["prompt"] for item in items}
            write_rows(folder / "tax" / f"{task}.jsonl", items)
            write_atomic(folder / "tax" / f"{task}.yaml", task_yaml(task).encode())
        texts = documents(world, params.corpus_documents, held_out)
        write_rows(folder / "corpus.jsonl", counted({"text": text} for text in texts))
    write_json(folder / SOURCE, {"source": "embedded"})
    metrics = {f"ingest/{name}_rows": count for name, count in rows.items()}
    return {**metrics, "ingest/corpus_documents": params.corpus_documents}
