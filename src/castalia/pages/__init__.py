"""The generated pages of the documentation; `python -m castalia.pages` writes them all.

What a page says stands in the code alone: in the docstrings of the config classes, in the tables of
GPT-NeoX's names, in the signatures of the public functions. A test compares each page with what
would be written.
"""
