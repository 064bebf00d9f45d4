"""Answers that the model in training writes to prompts, and their rewards.

Nothing here goes through a disk: the engine reads the weights of the trainer.
"""
