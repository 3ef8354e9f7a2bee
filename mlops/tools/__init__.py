"""Commands for people: chat, data comparison, pull, the study of the paper's claims, a copy for vLLM."""
