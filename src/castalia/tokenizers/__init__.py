"""Tokenizers: read, trained, and told apart by what they do to text.

`castalia.data` has the names that a user needs: `load_tokenizer`, `train_tokenizer`, `Tokenizer`.
"""
