"""Commands for people: chat, data comparison, pull, the study of the paper's claims, an engine of vLLM."""
