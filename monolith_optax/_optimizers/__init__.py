"""The optimizers of dense variables, one file each, and the base they share."""
