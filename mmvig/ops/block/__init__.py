"""A whole block of the backbones as one operator, made of the others; what only it needs."""
