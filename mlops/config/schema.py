"""JSON schemas of profiles and source descriptions, by which editors complete and check them as they are written.

    python -m mlops.config.schema        # writes profiles/schemas/; the first line of each YAML file names its schema
"""

import json
from pathlib import Path
from typing import Any, get_type_hints

from mlops.config.loader import PROFILES_DIR, model_of
from rlhf.curation.sources.spec import Entry, RulesParams
from rlhf.files import write_atomic
from rlhf.params import IngestParams, PpoParams, Profile

FOLDER = Path(PROFILES_DIR) / "schemas"
DRAFT = "https://json-schema.org/draft/2020-12/schema"


def _section(params_class: type) -> dict[str, Any]:
    """The schema of a section; an empty one is all defaults."""
    schema = model_of(params_class).model_json_schema()
    return {"type": ["object", "null"], "additionalProperties": False, "properties": schema["properties"]}


def profile_schema() -> dict[str, Any]:
    sections: dict[str, Any] = {name: _section(kind) for name, kind in get_type_hints(Profile).items()
                                if name != "arms"}
    sections["arms"] = {"type": "object", "minProperties": 1, "additionalProperties": _section(PpoParams),
                        "description": "the policies that PPO trains, each with what it changes of section ppo"}
    return {"$schema": DRAFT, "title": "instructflow profile", "type": "object", "additionalProperties": False,
            "properties": sections}


def source_schema() -> dict[str, Any]:
    entries = {"type": "array", "items": {"type": "object", "additionalProperties": False,
                                          "properties": model_of(Entry).model_json_schema()["properties"]}}
    roles = {"sft": "demonstrations", "rm": "comparisons", "ppo": "prompts", "corpus": "pretraining text"}
    return {"$schema": DRAFT, "title": "instructflow source description", "type": "object",
            "additionalProperties": False, "properties": {
                **{role: {**entries, "description": text} for role, text in roles.items()},
                "rules": _section(RulesParams), "embedded": _section(IngestParams)}}


def schemas() -> dict[Path, bytes]:
    """File → content."""
    return {FOLDER / f"{name}.json": (json.dumps(schema, indent=1, ensure_ascii=False) + "\n").encode()
            for name, schema in (("profile", profile_schema()), ("source", source_schema()))}


def main() -> None:
    for path, content in schemas().items():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, content)
        print(path)


if __name__ == "__main__":
    main()
