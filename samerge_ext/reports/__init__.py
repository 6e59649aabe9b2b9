"""What people look at: plots of coefficients and statistics."""
