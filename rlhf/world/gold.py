"""The gold labeler, if data/ comes from the embedded world; data/source.json states where it comes from."""

import json
from pathlib import Path

from rlhf.world.facts import World
from rlhf.world.labeler import GoldLabeler

SOURCE = "source.json"  # in the folder of the datasets
DATA_SOURCE = Path("data") / SOURCE


def gold_labeler(seed: int) -> GoldLabeler | None:
    """The embedded world's labeler without noise; None for other data, whose truth is unknown."""
    content = json.loads(DATA_SOURCE.read_text(encoding="utf-8"))
    return GoldLabeler(World(seed)) if content["source"] == "embedded" else None
