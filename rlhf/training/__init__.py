"""What every trainer needs: loop, optimizers, several processes, checkpoints, journal, seeds."""
