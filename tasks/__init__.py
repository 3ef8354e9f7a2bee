"""One module per pipeline stage; `python -m tasks.<stage>` is what dvc.yaml runs."""

import os

# Before torch and transformers are imported: no telemetry, no bars of theirs between our progress lines, and
# threads that spin only briefly, so that a stage shares its cores with the tracker instead of fighting it (with one
# core taken by another process a training step takes 2.1 times as long instead of 3 to 6 times).
for _name, _value in {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1",
                      "HF_HUB_DISABLE_TELEMETRY": "1", "DO_NOT_TRACK": "1", "TOKENIZERS_PARALLELISM": "true",
                      "GOMP_SPINCOUNT": "2000", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}.items():
    os.environ.setdefault(_name, _value)
