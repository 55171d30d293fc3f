"""The classes of the original system, under its own dotted names."""
