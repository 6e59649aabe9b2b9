"""A YAML file in mergekit's keys, and the merge that it describes."""
