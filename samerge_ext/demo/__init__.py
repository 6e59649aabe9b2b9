"""The demonstration on real experts: eight text tasks, a small sentence encoder, one merged model."""
