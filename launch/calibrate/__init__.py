"""Measuring this machine for the planner: `measure.py` on every rank, `fit.py` makes a cluster of it."""
