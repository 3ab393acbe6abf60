"""From a loss to row gradients."""
