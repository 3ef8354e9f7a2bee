"""Rows, text, batches: what stands between a JSON Lines file and a tensor."""
