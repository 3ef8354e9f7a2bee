"""One module per pipeline stage; `python -m tasks.<stage>` is what dvc.yaml runs."""
