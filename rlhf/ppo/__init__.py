"""PPO with a KL penalty."""
