"""Model folders on disk: read one tensor at a time, written whole or not at all."""
