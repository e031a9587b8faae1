"""Eviction policies: `table.py` has one row for each, `scores.py` the formulas that the rows use."""
