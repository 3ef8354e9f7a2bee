"""Prefect flows: order, retries, cancellation and artifacts of the stages in dvc.yaml."""
