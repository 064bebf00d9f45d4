"""The HTTP server: OpenAI's and CTranslate2's protocols over one batching scheduler."""
