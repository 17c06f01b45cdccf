"""The runner: plans to batches, the loop over a model's layers, executors."""
