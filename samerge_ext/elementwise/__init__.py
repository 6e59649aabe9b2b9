"""Merging number by number: packed weights, or model folders from file to file."""
