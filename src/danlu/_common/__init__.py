"""Private helpers; no mathematics of any method."""
