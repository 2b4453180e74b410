"""Executors move jobs to where they run; a job is one line of JSON and so is its result."""
