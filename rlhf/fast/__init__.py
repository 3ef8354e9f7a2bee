"""Only speed: the same results, up to rounding, as the plain passes. INSTRUCTFLOW_FAST=off switches it off."""
