"""Calling another role through typed stubs; see README.md."""
