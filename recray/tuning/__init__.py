"""Sweeps: many ordinary trains, each with values of its own for some keys, run by Ray Tune."""
