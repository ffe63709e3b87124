"""Causal masks proven causal, element by element."""
