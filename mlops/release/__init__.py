"""The gates, the registry, the model card, what is served."""
