"""Statistics of training steps: norms, activations, noise, and where the time goes.

Each is a `Statistic` in a file of its own, measured every so many steps and off by default. They
read what the loop has, change no number of it, and are right on any layout of ranks.
"""
