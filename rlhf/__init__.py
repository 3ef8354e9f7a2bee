"""The library: data, the embedded world, models, losses, trainers, evaluation. Knows no orchestrator or tracker."""
