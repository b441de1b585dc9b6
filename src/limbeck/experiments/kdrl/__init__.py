"""The experiments of KDRL."""
