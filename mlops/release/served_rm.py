"""The reward model as `mlflow models serve` runs it: {"dataframe_records": [{"prompt", "completion"}]} -> scores.

`messages`, as in OpenAI's API, may stand in the place of `prompt`.
"""

from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
from mlflow.pyfunc import PythonModel, PythonModelContext

from rlhf.model.chat_format import asked, load_codec
from rlhf.model.load import load_scorer
from rlhf.model.scoring import score_sequences


class RewardModel(PythonModel):
    """prompt, completion -> score."""

    def load_context(self, context: PythonModelContext) -> None:
        folder = Path(context.artifacts["model"])
        self.codec, self.model = load_codec(folder), load_scorer(folder)

    def predict(self, context: PythonModelContext, model_input: pd.DataFrame,
                params: dict[str, Any] | None = None) -> list[float]:
        prompts = self.codec.prompts([asked(row) for row in model_input.to_dict("records")])
        completions = self.codec.completions([str(text) for text in model_input["completion"]])
        return score_sequences(self.model, [prompt + completion for prompt, completion in
                                            zip(prompts, completions, strict=True)], self.codec.pad_id, "fp32")


mlflow.models.set_model(RewardModel())
