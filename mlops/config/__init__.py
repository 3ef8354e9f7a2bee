"""Typed parameters, source descriptions, what dvc.yaml declares, where things lie."""
