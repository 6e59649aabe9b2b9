"""Which way to hold a merged model fits a memory budget, and the model held that way."""
