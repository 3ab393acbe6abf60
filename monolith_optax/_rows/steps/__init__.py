"""From row gradients to a step."""
