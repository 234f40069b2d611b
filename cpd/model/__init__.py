"""What a user hands in, in one form: models by name, inputs, tensors, losses."""
