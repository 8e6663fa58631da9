"""Metrics, numpy only."""
