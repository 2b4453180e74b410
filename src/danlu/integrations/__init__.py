"""Other frameworks; each module here imports its framework, and nothing else in danlu does."""
