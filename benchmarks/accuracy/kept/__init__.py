"""Kept results: files by the hash of everything that a result depends on, and the code among that."""
