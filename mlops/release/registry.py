"""MLflow's model registry: versions of policy and reward model, their lineage, the aliases.

A version holds a pyfunc model that `mlflow models serve` runs, with the Hugging Face folder inside. Equal content
stays one version, however often it is promoted.
"""

import errno
import io
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from importlib.metadata import version as installed
from pathlib import Path
from typing import Any

import mlops.tracking.mlflow_client  # noqa: F401  (before mlflow: it sets the environment that mlflow reads)
import rlhf

# isort: split
import mlflow
from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.models import ModelSignature
from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema, TensorSpec
from mlflow.types.schema import Array, Object, Property

from mlops.tracking.mlflow_client import RUN_NAME_TAG, experiment_id, tracking_uri
from rlhf.errors import FULL, UserError

CHALLENGER, CHAMPION = "challenger", "champion"
CONTENT_TAG = "instructflow.content"
FOLDER = "model"  # the artifact's name inside the pyfunc model
SERVED = {"policy": "served_policy.py", "rm": "served_rm.py"}
REQUIREMENTS = ("mlflow", "torch", "transformers", "tokenizers", "safetensors", "numpy", "pandas")
ASKED: list[ColSpec | TensorSpec] = [
    ColSpec(DataType.string, "prompt", required=False),
    ColSpec(Array(Object([Property("role", DataType.string), Property("content", DataType.string)])), "messages",
            required=False)]
SIGNATURES = {
    "policy": ModelSignature(
        Schema(ASKED), Schema([ColSpec(DataType.string, "response")]),
        ParamSchema([ParamSpec("max_new_tokens", DataType.long, 64), ParamSpec("temperature", DataType.double, 1.0),
                     ParamSpec("seed", DataType.long, 1)])),
    "rm": ModelSignature(Schema([*ASKED, ColSpec(DataType.string, "completion")]),
                         Schema([ColSpec(DataType.double, "score")])),
}


@dataclass(frozen=True)
class Registry:
    """The registered models NAME-policy and NAME-rm at MLFLOW_TRACKING_URI, or in mlflow.db of the checkout."""

    name: str
    root: Path

    @property
    def client(self) -> MlflowClient:
        return MlflowClient(tracking_uri=tracking_uri(self.root), registry_uri=tracking_uri(self.root))

    def model(self, kind: str) -> str:
        return f"{self.name}-{kind}"

    def register(self, kind: str, folder: Path, content: str, run_name: str, lineage: Mapping[str, str]
                 ) -> ModelVersion:
        """The version that holds `folder`, created if there is none, tagged with its lineage.

        `kind`: "policy" or "rm". `content`: the folder's hash. Raises UserError where the registry does not answer.
        """
        with registry_errors():
            version = self._version_of(kind, content)
            if version is None:
                version = self._log(kind, folder, run_name)
            for key, value in {CONTENT_TAG: content, **lineage}.items():
                self.client.set_model_version_tag(self.model(kind), version.version, key, value)
            return version

    def set_alias(self, kind: str, alias: str, number: str) -> None:
        with registry_errors():
            self.client.set_registered_model_alias(self.model(kind), alias, number)

    def champion(self) -> ModelVersion | None:
        """The policy's version with the alias champion."""
        with registry_errors():
            try:
                return self.client.get_model_version_by_alias(self.model("policy"), CHAMPION)
            except MlflowException as error:
                if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):  # no model, no alias
                    return None
                raise

    def folder_of(self, version: ModelVersion, target: Path) -> Path:
        """The Hugging Face folder of a version, downloaded to `target`."""
        with registry_errors(), self._here():
            uri = f"models:/{version.name}/{version.version}"
            path = mlflow.artifacts.download_artifacts(uri, dst_path=str(target))
        folder = Path(path) / "artifacts"
        return next(item for item in sorted(folder.iterdir()) if (item / "config.json").is_file())

    def _version_of(self, kind: str, content: str) -> ModelVersion | None:
        try:
            versions = self.client.search_model_versions(f"name = '{self.model(kind)}'")
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return None
            raise
        return next((item for item in versions if item.tags.get(CONTENT_TAG) == content), None)

    def _log(self, kind: str, folder: Path, run_name: str) -> ModelVersion:
        os.environ["MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR"] = "false"
        with self._here(), redirect_stderr(io.StringIO()), mlflow.start_run(run_id=self._run_id(run_name)):
            logged = mlflow.pyfunc.log_model(name=kind, registered_model_name=self.model(kind), **_pyfunc(kind, folder))
        return self.client.get_model_version(self.model(kind), str(logged.registered_model_version))

    def _run_id(self, run_name: str) -> str:
        """The MLflow run of the pipeline run; a new one if the uploader has not created it yet."""
        experiment = experiment_id(self.client, self.root)
        found = self.client.search_runs([experiment], f"tags.`{RUN_NAME_TAG}` = '{run_name}'", max_results=1)
        run = found[0] if found else self.client.create_run(experiment, run_name=f"promote {run_name}")
        return str(run.info.run_id)

    @contextmanager
    def _here(self) -> Iterator[None]:
        """Points mlflow's own functions at this registry."""
        mlflow.set_tracking_uri(tracking_uri(self.root))
        mlflow.set_registry_uri(tracking_uri(self.root))
        yield


def _pyfunc(kind: str, folder: Path) -> dict[str, Any]:
    """What makes a pyfunc model of a Hugging Face folder."""
    return {"python_model": str(Path(__file__).with_name(SERVED[kind])), "artifacts": {FOLDER: str(folder)},
            "code_paths": [str(Path(rlhf.__file__).parent)], "signature": SIGNATURES[kind],
            "pip_requirements": [f"{name}=={installed(name)}" for name in REQUIREMENTS]}


def save_served(kind: str, folder: Path, target: Path) -> None:
    """The pyfunc model of a Hugging Face folder, as the registry holds it, in the new folder `target`."""
    with redirect_stderr(io.StringIO()):
        mlflow.pyfunc.save_model(path=str(target), **_pyfunc(kind, folder))


@contextmanager
def registry_errors() -> Iterator[None]:
    """Turns an MLflow error into a UserError of one line, that of a full disk under a database of ours into OSError."""
    try:
        yield
    except MlflowException as error:
        where = os.environ.get("MLFLOW_TRACKING_URI", "mlflow.db")
        if FULL.search(str(error)) and not where.startswith("http"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error
        raise UserError(f"the model registry at {where} reports: {' '.join(str(error).split())[:300]}") from error
