"""The journal's way to MLflow."""
