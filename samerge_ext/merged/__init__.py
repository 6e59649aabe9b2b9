"""The user's module at θ₀ + Σ λ τ, its weights held whole or merged unit by unit, and what a merge returns."""
