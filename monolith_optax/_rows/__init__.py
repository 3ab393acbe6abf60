"""Row-sparse training: gradients and optimizer steps on the rows of a batch only."""
