"""The base model: found and checked, loaded with our packed attention, given adapters, and turned into a loss."""
