"""The command `samerge`."""
