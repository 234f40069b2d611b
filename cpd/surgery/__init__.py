"""Narrower models, in place; the masked check; recovery without gradients."""
