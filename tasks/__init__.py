"""One module per pipeline stage; `python -m tasks.<stage>` is what dvc.yaml runs."""

import mlops  # noqa: F401  (first: it sets the environment that torch and transformers read)
