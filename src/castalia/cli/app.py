"""The verbs by name.

Only light imports here and at the top of each verb's module: `--help` must not wait for torch.
"""

import typer

from castalia import __version__
from castalia.cli import (
    agreement,
    audit,
    batches,
    cleaning,  # noqa: F401  adds its commands to those of `data`
    count,
    data,
    demo,
    doctor,
    eval,
    export,
    generate,
    importing,
    intervene,
    launch,
    memorization,
    memorize,
    mixing,
    prepare,
    report,
    results,
    runs,
    scaling,
    serve,
    show,
    study,
    study_pronouns,  # noqa: F401  adds its command to those of `study`
    study_term_frequency,  # noqa: F401  likewise
    suite,
    trace,
    train,
    tune,
    tuning,
    upload,
    verify,
    version,
    view,
    viewing,  # noqa: F401  likewise
    weights,
)
from castalia.terminal.command import Verbs

app = Verbs(
    name="castalia",
    help="Train, study and serve suites of language models, on a laptop CPU or a GPU cluster.",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def print_version(wanted: bool) -> None:
    """Print the version and exit, if it is wanted."""
    if wanted:
        typer.echo(f"castalia {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: bool = typer.Option(
        False,
        "--version",
        callback=print_version,
        is_eager=True,
        metavar="",
        help="Print the version.",
    ),
) -> None:
    """Train, study and serve suites of language models, on a laptop CPU or a GPU cluster."""


TEXT = "Text to tokens"
TRAINING = "Training"

# In the order of use, which is also that of `castalia --help`.
PANELS = {
    "Start": (demo.demo, doctor.doctor, version.version),
    TEXT: (prepare.prepare,),
    TRAINING: (
        show.show,
        tuning.lr_find,
        tuning.coord_check,
        tune.tune,
        train.train,
        launch.launch,
        suite.suite,
        runs.runs,
        intervene.intervene,
        report.report,
        view.view,
        verify.verify,
        audit.audit,
        weights.weights,
        results.results,
        agreement.agreement,
        scaling.scaling,
        memorization.memorization,
    ),
    "What a run has read": (batches.batches, trace.trace, trace.index, count.count),
    "Trained models": (
        generate.generate,
        eval.eval_,
        memorize.memorize,
        importing.import_,
        export.export,
        upload.upload,
        serve.serve,
    ),
}
for title, verbs in PANELS.items():
    for verb in verbs:
        # `import` and `eval` are words of Python, so their functions are import_ and eval_.
        name = verb.__name__.rstrip("_").replace("_", "-")
        app.command(name, rich_help_panel=title)(verb)
# typer lists a verb with verbs of its own after the others of its panel.
app.add_typer(data.app, name="data", rich_help_panel=TEXT)
app.add_typer(mixing.app, name="mixing", rich_help_panel=TRAINING)
app.add_typer(study.app, name="study", rich_help_panel="What a run has read")
