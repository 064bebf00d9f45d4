"""The page of `castalia report`, served while runs train, with readers of batches, samples and
memorized rows. It only reads."""
