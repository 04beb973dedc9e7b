"""From stored tensors to packed weights, while serving and ahead of it."""
