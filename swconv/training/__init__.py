"""Training: data, loop, checkpoints, records, and the replay into MLflow."""
