"""The gold labeler, where the data is the embedded world's: data/source.json says so."""

import json
from pathlib import Path

from rlhf.world.facts import World
from rlhf.world.labeler import GoldLabeler

SOURCE = Path("data/source.json")


def gold_labeler(seed: int) -> GoldLabeler | None:
    """The noise-free labeler of the embedded world; None for people's data, whose truth nobody knows."""
    described = json.loads(SOURCE.read_text(encoding="utf-8"))
    return GoldLabeler(World(seed)) if described["source"] == "embedded" else None
