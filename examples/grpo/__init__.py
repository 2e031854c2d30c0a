"""The second example: a tiny transformer learns to add by trying. `README.md` says how to run it."""
