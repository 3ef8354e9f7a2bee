"""Shared by all trainers: training loop, optimizers, distributed training, checkpoints, journal, seeds."""
