"""The JSON schemas that editors complete profiles and source descriptions by."""

import json
from pathlib import Path

import jsonschema
import pytest
import yaml

from mlops.config.schema import profile_schema, schemas, source_schema
from tests.flows.checkout import REPOSITORY

PROFILES = sorted((REPOSITORY / "profiles").glob("*.yaml"))
SOURCES = sorted((REPOSITORY / "profiles" / "sources").glob("*.yaml"))


def test_the_schemas_in_git_are_those_of_the_parameters() -> None:
    for path, content in schemas().items():
        assert (REPOSITORY / path).read_bytes() == content, "python -m mlops.config.schema writes it"


@pytest.mark.parametrize("path", PROFILES + SOURCES, ids=lambda path: path.stem)
def test_every_file_names_its_schema_and_fits_it(path: Path) -> None:
    first = path.read_text().splitlines()[0]
    named = first.removeprefix("# yaml-language-server: $schema=")
    assert (path.parent / named).resolve().is_file(), first
    schema = json.loads((path.parent / named).read_text())
    jsonschema.Draft202012Validator(schema).validate(yaml.safe_load(path.read_text()))


@pytest.mark.parametrize(("schema", "content"), [
    (profile_schema(), {"ppo": {"kl_gaol": 1}}), (profile_schema(), {"ppo": {"kl_goal": 0}}),
    (profile_schema(), {"arms": {}}), (profile_schema(), {"pop": {}}),
    (source_schema(), {"rm": [{"file": "a"}]}), (source_schema(), {"rules": {"min_k": 1}})])
def test_what_the_loader_refuses_the_schema_marks(schema: dict[str, object], content: dict[str, object]) -> None:
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft202012Validator(schema).validate(content)
