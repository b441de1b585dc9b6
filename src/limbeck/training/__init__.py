"""Training loops as generators: one optimiser step per `next`; what is minimised is an argument."""
