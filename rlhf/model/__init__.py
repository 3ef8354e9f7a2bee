"""Models as Hugging Face folders: load, pack, forward pass, sample, score."""
