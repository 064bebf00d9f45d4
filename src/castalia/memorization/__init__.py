"""What a model completes by itself of the rows that it was trained on."""
