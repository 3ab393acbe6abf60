"""The optimizers of dense variables, one file each, and what they share."""
