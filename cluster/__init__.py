"""Runs: the only room that imports ray."""
