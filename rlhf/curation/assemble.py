"""From a source description to the three datasets in one pass: read, screen in processes, apply the rules, write.

Texts are spooled to files; memory holds only their normalised prompts and a few numbers per row.
"""

import json
import multiprocessing
import multiprocessing.pool
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any

import numpy as np

from rlhf.curation.characters import is_visible
from rlhf.curation.loss import EXAMPLES, Quarantine, check_loss, example, lost_rows
from rlhf.curation.merge import merged_ranking
from rlhf.curation.rules import RULES, STAYS, Rows, apply_rules
from rlhf.curation.screen import Quarantined, Screened, screen_rows
from rlhf.curation.sources.columns import corpus_text
from rlhf.curation.sources.groups import build_groups
from rlhf.curation.sources.layouts import GROUPED_BY
from rlhf.curation.sources.map_rows import check_columns, row_of, wanted
from rlhf.curation.sources.paths import Seen
from rlhf.curation.sources.read import Batch, name_of, read_entry
from rlhf.curation.sources.spec import Entry, Source
from rlhf.curation.sources.trees import build_trees
from rlhf.data.prompts import prompt_text
from rlhf.data.schema import KEYS, SPLITS
from rlhf.errors import UserError
from rlhf.files import write_json

QUARANTINE, DROPPED, REPORT = "quarantine.jsonl", "dropped.jsonl", "rules.json"
AHEAD = 4  # batches in flight per process
FEW = 3  # batches of an entry that are screened without a pool


def assemble(source: Source, root: Path, folder: Path, seed: int, processes: int = 1,
             worker_init: Callable[[], None] | None = None, on_rows: Callable[[str, int], None] | None = None
             ) -> dict[str, Any]:
    """Writes <role>.jsonl, quarantine.jsonl, dropped.jsonl and rules.json into `folder`; returns the report.

    `root`: the folder that file patterns are relative to. `on_rows(role, count)` is called with the number of rows
    processed. The bytes of the datasets depend on the rows and the seed, not on the order of the rows or on
    `processes`. Raises UserError if a source cannot be read, has no usable row, or loses more rows than it may.
    """
    folder.mkdir(parents=True, exist_ok=True)
    roles = [role for role in KEYS if getattr(source, role)]
    spools = {role: _Spool(folder / f"{role}.spool") for role in roles}
    lost = Quarantine()
    read: Counter[str] = Counter()
    with ExitStack() as stack:
        quarantine = stack.enter_context((folder / QUARANTINE).open("w", encoding="utf-8"))
        for spool in spools.values():
            stack.enter_context(spool)
        run = _pool(processes, worker_init, stack)
        for role in roles:
            for entry in getattr(source, role):
                before, seen = read[role], Seen()
                for place, screened, bad, columns in run(_tasks(role, entry, source, root, folder, seed, seen)):
                    seen.merge(columns)
                    for row in screened:
                        spools[role].add(place, row)
                    lost.add(role, place, screened, bad)
                    for item in bad:
                        found = {"dataset": role, "source": place, "row": item.number, "reason": item.reason}
                        quarantine.write(json.dumps(found | {"content": item.row}, default=_shown) + "\n")
                    read[role] += len(screened) + len(bad)
                    if on_rows:
                        on_rows(role, len(screened) + len(bad))
                check_columns(seen, role, entry, name_of(entry))
                if read[role] == before:
                    hint = f"; where: {entry.where} may fit none" if entry.where else ""
                    raise UserError(f"{name_of(entry)}: no row for {role}{hint}")
            lost.check_files(role, source.rules)
        decided = apply_rules({role: spools[role].rows for role in roles}, source.rules, seed)
        report: dict[str, Any] = {}
        examples: dict[str, dict[str, list[str]]] = {}
        with (folder / DROPPED).open("w", encoding="utf-8") as dropped:
            for role in roles:
                splits, fates = decided[role]
                spools[role].write(folder / f"{role}.jsonl", splits, fates, source.rules.merge_rankings)
                spools[role].write_dropped(dropped, role, fates)
                report[role] = _report(spools[role].rows, read[role], lost.counts.get(role, Counter()), splits, fates,
                                       source.rules.language)
                examples[role] = lost.examples.get(role, {}) | spools[role].examples(fates)
        check_loss(report, source.rules, examples)
    for spool in spools.values():
        spool.path.unlink()
    if source.corpus:
        report["corpus"] = _write_corpus(source.corpus, root, folder / "corpus.jsonl")
    write_json(folder / REPORT, report)
    return report


def _shown(value: Any) -> str:
    """What JSON cannot hold, as text; of bytes, such as an image's, only the number."""
    return f"{len(value)} bytes" if isinstance(value, bytes) else str(value)


class _Spool:
    """Rows on disk in reading order; in memory the columns that the rules need."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows = Rows()
        self.ends: list[int] = []
        self.cuts: list[int] = []
        self.places: list[str] = []
        self.place_of: list[int] = []
        self.numbers: list[int] = []

    def __enter__(self) -> "_Spool":
        self.file: IO[bytes] = self.path.open("w+b")
        self.end = 0
        return self

    def __exit__(self, *error: Any) -> None:
        self.file.close()

    def add(self, place: str, row: Screened) -> None:
        self.rows.add(row)
        if not self.places or self.places[-1] != place:
            self.places.append(place)
        self.file.write(row.head + row.tail)
        self.cuts.append(self.end + len(row.head))
        self.end += len(row.head) + len(row.tail)
        self.ends.append(self.end)
        self.place_of.append(len(self.places) - 1)
        self.numbers.append(row.number)

    def line(self, index: int) -> tuple[bytes, bytes]:
        """A row's JSON before and after its split."""
        start, cut = self.ends[index - 1] if index else 0, self.cuts[index]
        self.file.seek(start)
        line = self.file.read(self.ends[index] - start)
        return line[:cut - start], line[cut - start:]

    def write(self, path: Path, splits: "np.ndarray", fates: "np.ndarray", merge: bool) -> None:
        """Writes the rows that stay, each with its split, in the order of their content's hash.

        `merge`: rankings of one prompt by one labeler become one row where their orders agree; changes `fates`.
        """
        self.file.flush()
        merged = self._merge(splits, fates) if merge else {}
        stay = np.flatnonzero(fates == STAYS)
        orders = np.array(self.rows.orders, np.uint64)[stay]
        stay = stay[np.argsort(orders, kind="stable")]
        repeated = _repeated(np.array(self.rows.own_ids, np.uint64)[stay])
        words = [f', "split": "{split}", '.encode() for split in SPLITS]
        with path.open("wb") as out:
            for index, again in zip(stay.tolist(), repeated.tolist(), strict=True):
                head, tail = self.line(index)
                if again:
                    head = _with_own_id(head, self.rows.orders[index])
                if index in merged:
                    tail = self._merged(merged[index])
                out.write(head + words[splits[index]] + tail)

    def _merge(self, splits: "np.ndarray", fates: "np.ndarray") -> dict[int, list[int]]:
        """The rows that become one, by the row that stands for them; the others get the fate `merged`."""
        together: dict[tuple[int, int], list[int]] = {}
        for index in np.flatnonzero(fates == STAYS).tolist():
            if self.rows.rankers[index]:
                together.setdefault((self.rows.rankers[index], int(splits[index])), []).append(index)
        merged = {}
        for indices in together.values():
            indices.sort(key=self.rows.orders.__getitem__)
            if len(indices) > 1 and self._merged(indices):
                merged[indices[0]] = indices
                fates[indices[1:]] = list(RULES).index("merged")
        return merged

    def _merged(self, indices: list[int]) -> bytes:
        """The tail of the row that `indices` become, or b"" if their orders do not agree."""
        rows = [json.loads(b"{" + self.line(index)[1]) for index in indices]
        ranking = merged_ranking([(row["completions"], row["ranks"]) for row in rows])
        if ranking is None:
            return b""
        row = rows[0] | {"completions": ranking[0], "ranks": ranking[1]}
        return (json.dumps(row, ensure_ascii=False, separators=(", ", ": "))[1:] + "\n").encode()

    def examples(self, fates: "np.ndarray") -> dict[str, list[str]]:
        """By rule, lines that show the first rows that it dropped; of personal data only their place."""
        shown = {}
        for number, rule in enumerate(RULES):
            lines = []
            for index in np.flatnonzero(fates == number)[:EXAMPLES].tolist():
                prompt = "" if rule == "personal_data" else json.loads(b"{" + self.line(index)[1])["prompt"]
                lines.append(example(self.places[self.place_of[index]], self.numbers[index], prompt_text(prompt)))
            shown[rule] = lines
        return shown

    def write_dropped(self, out: IO[str], role: str, fates: "np.ndarray") -> None:
        """Writes place and rule of the dropped rows, without their text, which may contain personal data."""
        names = list(RULES)
        for index in np.flatnonzero(fates != STAYS).tolist():
            out.write(json.dumps({"dataset": role, "source": self.places[self.place_of[index]],
                                  "row": self.numbers[index], "rule": names[fates[index]]}) + "\n")


def _repeated(ids: "np.ndarray") -> "np.ndarray":
    """Whether an id (0: none) stands at an earlier place too."""
    first = np.zeros(len(ids), bool)
    first[np.unique(ids, return_index=True)[1]] = True
    return ~first & (ids != 0)


def _with_own_id(head: bytes, order: int) -> bytes:
    """A row's head whose prompt_id, which an earlier comparison of the prompt has, ends with the row's own hash."""
    fields = json.loads(head + b"}")
    fields["prompt_id"] = f"{fields['prompt_id']}-{order:016x}"
    return json.dumps(fields, ensure_ascii=False, separators=(", ", ": "))[:-1].encode()


def _report(rows: Rows, read: int, quarantined: Counter[str], splits: "np.ndarray", fates: "np.ndarray", language: str
            ) -> dict[str, Any]:
    """Numbers of rows read, quarantined by reason, dropped by rule and kept; read is the sum of the others.

    `users`: those that the source names.
    """
    stay = fates == STAYS
    foreign = np.array(rows.foreign, np.bool_)
    users = np.array(rows.users, np.uint64)[stay]
    report: dict[str, Any] = {
        "read": read, "quarantined": dict(sorted(quarantined.items())),
        "dropped": {name: int((fates == number).sum()) for number, name in enumerate(RULES)}, "kept": int(stay.sum()),
        "users": len(np.unique(users[users != 0])),
        **{word: int((stay & (splits == number)).sum()) for number, word in enumerate(SPLITS)}}
    return report | {
        "lost_share": round(lost_rows(report) / max(read, 1), 4), "language": language,
        "language_share_read": round(1 - float(foreign.mean()), 4) if len(foreign) else 1.0,
        "language_share": round(1 - float(foreign[stay].mean()), 4) if stay.any() else 1.0}


def _tasks(role: str, entry: Entry, source: Source, root: Path, folder: Path, seed: int, seen: Seen
           ) -> Iterator[tuple[str, tuple[Any, ...]]]:
    for place, numbers, rows in batches_of(entry, root, folder, seen):
        yield place, (role, entry, source.rules, seed, numbers, rows)


def batches_of(entry: Entry, root: Path, folder: Path, seen: Seen, most: int = sys.maxsize) -> Iterator[Batch]:
    """Batches of an entry's rows, its first `most` or more; made into trees or groups on disk where they are such.

    `seen` learns the columns of grouped rows. Raises UserError.
    """
    batches = _first(read_entry(entry, root), most)
    if entry.layout == "oasst_messages":
        batches = build_trees(_as_rows(batches, entry), folder)
    grouped_by = [GROUPED_BY[entry.layout]] if entry.layout in GROUPED_BY else entry.groups()
    if grouped_by:
        batches = build_groups(batches, entry, grouped_by, folder, seen)
    return batches


def _first(batches: Iterable[Batch], most: int) -> Iterator[Batch]:
    for batch in batches:
        yield batch
        most -= len(batch[1])
        if most <= 0:
            return


def _as_rows(batches: Iterable[Batch], entry: Entry) -> Iterator[Batch]:
    """Parses the rows of a message table before they are grouped into trees. Raises UserError for a bad one."""
    for place, numbers, rows in batches:
        parsed = []
        for number, row in zip(numbers, rows, strict=True):
            try:
                parsed.append((number, row_of(row, entry)))
            except ValueError as error:
                raise UserError(f"{place}: row {number}: {error}; a tree cannot be built without it") from None
        yield place, [number for number, row in parsed if row], [row for _, row in parsed if row]


Screen = Callable[[Iterator[tuple[str, tuple[Any, ...]]]],
                  Iterator[tuple[str, list[Screened], list[Quarantined], Seen]]]


def _pool(processes: int, worker_init: Callable[[], None] | None, stack: ExitStack) -> Screen:
    """Runs `screen_rows` over an entry's batches in order: a few here, many in processes with a bounded number of
    batches in flight, for the start of the processes takes seconds."""
    started: list[multiprocessing.pool.Pool] = []

    def pool() -> multiprocessing.pool.Pool:
        if not started:
            started.append(stack.enter_context(multiprocessing.get_context("spawn").Pool(processes, worker_init)))
        return started[0]

    def run(tasks: Iterator[tuple[str, tuple[Any, ...]]]
            ) -> Iterator[tuple[str, list[Screened], list[Quarantined], Seen]]:
        few = list(islice(tasks, FEW))
        if processes <= 1 or len(few) < FEW:
            yield from ((place, *screen_rows(*arguments)) for place, arguments in chain(few, tasks))
            return
        pending: deque[tuple[str, Any]] = deque()
        for place, arguments in chain(few, tasks):
            pending.append((place, pool().apply_async(screen_rows, arguments)))
            if len(pending) >= AHEAD * processes:
                first, result = pending.popleft()
                yield (first, *result.get())
        for first, result in pending:
            yield (first, *result.get())

    return run


def _write_corpus(entries: list[Entry], root: Path, path: Path) -> dict[str, int]:
    """Writes the pretraining texts in reading order, one {"text"} a line; returns their numbers.

    Raises UserError for a row without a text, and where there is none at all.
    """
    read = written = 0
    with path.open("w", encoding="utf-8") as out:
        for entry in entries:
            seen, bad = Seen(), None
            for place, numbers, rows in read_entry(entry, root):
                for number, item in zip(numbers, rows, strict=True):
                    try:
                        row = row_of(item, entry)
                        if row is None:
                            continue
                        seen.add(row, entry.paths())
                        if not wanted(row, entry):
                            continue
                        read += 1
                        text = corpus_text(row, entry)
                    except ValueError as error:
                        bad = bad or UserError(f"{place}: row {number}: {error}")
                        continue
                    if is_visible(text):
                        out.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
                        written += 1
            check_columns(seen, "corpus", entry, name_of(entry))  # says more than the first row that lacks one
            if bad:
                raise bad
    if not written:
        raise UserError(f"{name_of(entries[0])}: no text for corpus")
    return {"read": read, "documents": written, "empty": read - written}
