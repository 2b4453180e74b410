"""Trials of `danlu.flows`."""
