"""Sweeps: many ordinary training runs with different values for some configuration keys, run by Ray Tune."""
