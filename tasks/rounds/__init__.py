"""A round's stages, which dvc.yaml unrolls: collect, labels, rm, ppo, scores. People label between the first two."""
