"""Builds reply trees from a table of messages (oasst1 on the hub) without holding the table in memory."""

import json
import sqlite3
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from rlhf.curation.sources.formats import Unreadable

BATCH = 200
FIELDS = ("text", "role", "rank", "deleted", "user_id", "lang")


def build_trees(batches: Iterable[tuple[str, list[int], list[Any]]], folder: Path
                ) -> Iterator[tuple[str, list[int], list[Any]]]:
    """Batches of trees, {prompt: root message with replies}, from batches of messages in any order.

    A tree's number is the row of its root. The messages are stored in a temporary database in `folder`.
    """
    file = folder / "messages.sqlite"
    file.unlink(missing_ok=True)
    database = sqlite3.connect(file, isolation_level=None)
    try:
        database.execute("PRAGMA journal_mode = OFF")
        database.execute("PRAGMA synchronous = OFF")
        database.execute("CREATE TABLE message (tree TEXT, id TEXT, parent TEXT, row INTEGER, body TEXT)")
        name = ""
        database.execute("BEGIN")
        for place, numbers, rows in batches:
            name = name or place
            database.executemany("INSERT INTO message VALUES (?, ?, ?, ?, ?)", (
                (row.get("message_tree_id") or row.get("message_id"), row.get("message_id"), row.get("parent_id"),
                 number, json.dumps({key: row.get(key) for key in FIELDS}))
                for number, row in zip(numbers, rows, strict=True)))
        database.execute("COMMIT")
        database.execute("CREATE INDEX by_tree ON message (tree, row)")
        yield from _trees(database, name)
    finally:
        database.close()
        file.unlink(missing_ok=True)


def _trees(database: sqlite3.Connection, place: str) -> Iterator[tuple[str, list[int], list[Any]]]:
    numbers: list[int] = []
    trees: list[Any] = []
    messages: list[tuple[str, str, str, int, str]] = []
    for message in database.execute("SELECT tree, id, parent, row, body FROM message ORDER BY tree, row"):
        if messages and message[0] != messages[-1][0]:
            _add_tree(messages, numbers, trees)
            messages = []
            if len(trees) >= BATCH:
                yield place, numbers, trees
                numbers, trees = [], []
        messages.append(message)
    if messages:
        _add_tree(messages, numbers, trees)
    if trees:
        yield place, numbers, trees


def _add_tree(messages: list[tuple[str, str, str, int, str]], numbers: list[int], trees: list[Any]) -> None:
    """Adds the tree of some messages; one whose parent is not there comes by itself, as Unreadable."""
    nodes = {name: json.loads(body) | {"replies": []} for _, name, _, _, body in messages}
    for _, name, parent, number, _ in messages:
        if parent in nodes:
            nodes[parent]["replies"].append(nodes[name])
        elif not parent:
            numbers.append(number)
            trees.append({"prompt": nodes[name]})
        else:
            numbers.append(number)
            trees.append(Unreadable("answers a message that is not there", nodes[name] | {"parent_id": parent}))
