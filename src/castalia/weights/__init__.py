"""What the weights of checkpoints say: whether they are what they claim, and how they move."""
