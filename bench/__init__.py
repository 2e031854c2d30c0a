"""Measurements of the runtime beside what its users have today. See `README.md`."""
