"""The model: loading, the built-in ones, adapters, packed attention, the loss."""
