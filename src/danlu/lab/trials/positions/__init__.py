"""Trials: one declaration per method."""
