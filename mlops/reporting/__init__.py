"""The report, its plots and tables."""
