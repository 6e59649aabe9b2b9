"""What people look at: reports of merges as pages, model cards and comparisons; plots of coefficients and statistics."""
