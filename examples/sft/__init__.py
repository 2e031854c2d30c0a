"""The main example: two trainers and an evaluator train a small GPT. `README.md` says how to run it."""
