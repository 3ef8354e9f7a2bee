"""The policy as `mlflow models serve` runs it: {"dataframe_records": [{"prompt": ...}]} -> responses.

A row has `prompt`, a text, or `messages`, a conversation as in OpenAI's API.
MLflow executes this file when it loads a version; `rlhf` and the Hugging Face folder are logged with it.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.pyfunc import PythonModel, PythonModelContext

from rlhf.model.chat_format import asked, load_codec
from rlhf.model.load import context_of, load_policy
from rlhf.model.sampling import Sampling, sample_responses
from rlhf.training.seeding import generator


def check_request(prompts: Sequence[Sequence[int]], sampling: Sampling, seed: int, positions: int) -> None:
    """Raises ValueError for what cannot be sampled."""
    for holds, message in (
        (0 <= sampling.temperature < math.inf, f"temperature = {sampling.temperature:g}: must be a number >= 0"),
        (sampling.max_new_tokens >= 1, f"max_new_tokens = {sampling.max_new_tokens}: must be >= 1"),
        (seed >= 0, f"seed = {seed}: must be >= 0"),
    ):
        if not holds:
            raise ValueError(message)
    for number, prompt in enumerate(prompts, start=1):
        if len(prompt) + sampling.max_new_tokens > positions:
            raise ValueError(f"row {number}: {len(prompt)} tokens and max_new_tokens = {sampling.max_new_tokens}: the "
                             f"model has {positions} positions")


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
        if not {"prompt", "messages"} & set(model_input.columns):
            raise MlflowException.invalid_parameter_value("a row needs prompt, a text, or messages, a conversation")
        try:
            prompts = self.codec.prompts([asked(row) for row in model_input.to_dict("records")])
            check_request(prompts, sampling, int(options["seed"]), context_of(self.model))
        except ValueError as error:  # the client's mistake: status 400 instead of 500
            raise MlflowException.invalid_parameter_value(str(error)) from None
        responses = sample_responses(self.model, prompts, sampling, generator(int(options["seed"]), "served"))
        return [self.codec.decode(ids) for ids in responses]


mlflow.models.set_model(Policy())
