"""What StatsMerging reads of the experts' weights, and the network that it learns."""
