"""The HTTP server: OpenAI's API over one batching scheduler for each model.

One request holds one or more *texts* (`ServedText`). A text waits in the scheduler's queue, takes a
slot of the model, and emits a `StreamEvent` for each step until it ends.
"""
