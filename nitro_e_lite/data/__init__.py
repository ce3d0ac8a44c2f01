"""Training data: raw pictures to shards, shards to batches."""
