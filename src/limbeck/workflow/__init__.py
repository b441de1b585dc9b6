"""How notebooks, stages and records hang together: what runs, and whether what was run still stands."""
