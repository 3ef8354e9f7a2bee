"""Checkov's rules for manifests and images, offline: `make scan` installs it in an environment of its own."""

import json
import subprocess
from typing import Any

import pytest

from tests.flows.checkout import REPOSITORY

CHECKOV = REPOSITORY / ".venv-tools" / "bin" / "checkov"
# What we do not follow, where, and why. A finding that is not here fails, and so does an exception that finds nothing.
EVERYWHERE = {"postgres", "s3", "prefect", "mlflow", "worker", "gpu-run", "gpu-nodes"}
EXCEPTIONS = {
    "CKV_K8S_35": (EVERYWHERE, "Prefect, MLflow, boto3 and git take their secrets from the environment"),
    "CKV_K8S_43": (EVERYWHERE, "a digest belongs to a registry: `python -m infra.digests` writes those of yours"),
    "CKV_K8S_9": ({"worker"}, "nothing connects to a worker"),
    "CKV_K8S_40": ({"postgres"}, "the image's own user is 999"),
}

pytestmark = pytest.mark.skipif(not CHECKOV.exists(), reason="needs checkov: `make scan` installs it")


def scan() -> list[dict[str, Any]]:
    done = subprocess.run([CHECKOV, "-d", REPOSITORY / "infra", "--framework", "kubernetes", "dockerfile", "--compact",
                           "--quiet", "--skip-download", "-o", "json"], capture_output=True, text=True)
    found = json.loads(done.stdout)
    return found if isinstance(found, list) else [found]


def test_checkov_finds_nothing_but_the_exceptions() -> None:
    reports = scan()
    assert {item["check_type"] for item in reports} == {"kubernetes", "dockerfile"}
    assert sum(item["summary"]["resource_count"] for item in reports) > 10
    assert not any(item["summary"]["parsing_errors"] for item in reports)
    found: dict[str, set[str]] = {}
    said = {}
    for report in reports:
        for failed in report["results"]["failed_checks"]:
            found.setdefault(failed["check_id"], set()).add(failed["resource"].split(".")[-1])
            said[failed["check_id"]] = failed["check_name"]
    assert found == {check: where for check, (where, _) in EXCEPTIONS.items()}, said
