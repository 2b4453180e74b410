"""Tasks: data, model and training loop, one file per task."""
