"""Curation of external data: read, screen, filter and split its rows."""
