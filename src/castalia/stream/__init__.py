"""The training stream: the rows that steps read, where a text stood in them, counts over them."""
