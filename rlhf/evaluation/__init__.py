"""What is measured of finished models."""
