"""The loop that learned methods share: its configuration, its passes, its calibration set, its state on disk."""
