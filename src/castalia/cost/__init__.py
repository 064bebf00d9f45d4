"""What a layout costs before it runs: divisibility, memory, FLOPs, communication. Torch-free."""
