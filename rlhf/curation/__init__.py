"""Rows of other people's data: read, checked, cleaned, split."""
