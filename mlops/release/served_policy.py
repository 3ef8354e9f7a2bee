"""The policy as `mlflow models serve` runs it: {"dataframe_records": [{"prompt": ...}]} -> responses.

A row has `prompt`, a text, or `messages`, a conversation as in OpenAI's API.
MLflow executes this file when it loads a version; `rlhf` and the Hugging Face folder are logged with it.
"""

from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
from mlflow.pyfunc import PythonModel, PythonModelContext

from rlhf.model.chat_format import asked, load_codec
from rlhf.model.load import load_policy
from rlhf.model.sampling import Sampling, sample_responses
from rlhf.training.seeding import generator


class Policy(PythonModel):
    """prompt -> response."""

    def load_context(self, context: PythonModelContext) -> None:
        folder = Path(context.artifacts["model"])
        self.codec, self.model = load_codec(folder), load_policy(folder)

    def predict(self, context: PythonModelContext, model_input: pd.DataFrame,
                params: dict[str, Any] | None = None) -> list[str]:
        options = {"max_new_tokens": 64, "temperature": 1.0, "seed": 1, **(params or {})}
        sampling = Sampling(int(options["max_new_tokens"]), self.codec.stop_ids, self.codec.pad_id,
                            float(options["temperature"]))
        prompts = self.codec.prompts([asked(row) for row in model_input.to_dict("records")])
        responses = sample_responses(self.model, prompts, sampling, generator(int(options["seed"]), "served"))
        return [self.codec.decode(ids) for ids in responses]


mlflow.models.set_model(Policy())
