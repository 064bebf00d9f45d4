"""Short runs that answer a question before a long one: the learning rate, and the scale of
activations by width. They leave nothing in the folder of the run."""
