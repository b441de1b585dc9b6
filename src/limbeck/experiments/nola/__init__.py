"""The experiments of NOLA."""
