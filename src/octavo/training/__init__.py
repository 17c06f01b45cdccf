"""Training of what guesses for a model: needs PyTorch, which nothing else of Octavo does."""
