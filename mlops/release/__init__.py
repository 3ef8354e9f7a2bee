"""Release: gates, model registry, model card, and the code that MLflow serves."""
