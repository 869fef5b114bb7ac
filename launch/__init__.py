"""What every task script runs on: configuration, processes, the training loop, checkpoints, reports."""
