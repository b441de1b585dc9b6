"""The experiments of SinKD."""
