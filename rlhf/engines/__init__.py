"""Engines that sample beside the trainer: servers of vLLM, which get the policy's weights over a connection."""
