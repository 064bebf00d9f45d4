"""`castalia train`: train the run that a config describes, or resume it."""

import signal
import sys

from castalia.terminal.flags import Config, ConfigFolder


def train(config: Config, conf_dir: ConfigFolder = None) -> None:
    """Train a model; the same command again resumes from the newest good checkpoint.

    Examples:

      castalia train debug output=runs/first

      castalia train runs/first train.steps=100

      castalia train pythia-14m data.train=data/c data.tokenizer=tok.json

      castalia train -d configs pythia/70M local_setup

      torchrun --nproc-per-node 2 -m castalia train debug
    """
    from castalia.recipes import in_folder, resolve
    from castalia.train.hooks import StopOnSignal
    from castalia.train.run import Announced, run

    resolved = resolve(in_folder(conf_dir, config))
    trainer = run(
        resolved.config,
        ["castalia", *sys.argv[1:]],
        announced=Announced(resolved.changes, resolved.start_notes),
    )
    if trainer.stop:
        # Everything is saved: a second request must not end the exiting process with an error.
        for number in StopOnSignal.polite:
            signal.signal(number, signal.SIG_IGN)
