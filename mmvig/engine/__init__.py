"""What training and testing need around a model; each module is imported by those who need it."""
