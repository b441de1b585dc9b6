"""What a trained model is scored by."""
