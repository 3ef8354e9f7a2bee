"""The embedded source: a small synthetic world, generated from a seed, in which the truth is known.

It replaces human data, so that the pipeline runs anywhere and reward hacking, reward-model accuracy and labeler
disagreement can be measured. It is not human data, and results on it say nothing about any real model.
"""
