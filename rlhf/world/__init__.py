"""The embedded source: a small written world, made from a seed, in which the truth is known.

It stands in for human data so that the line runs anywhere and reward hacking, reward-model accuracy and labeler
disagreement can be measured. It is not human data, and results on it say nothing about any real model.
"""
