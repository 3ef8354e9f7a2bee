"""From a JSON Lines file to batches of tensors: rows, token stores, batching, packing."""
