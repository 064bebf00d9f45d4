"""`castalia serve`."""

import typer


def serve(
    models: list[str] = typer.Argument(
        help="Runs, RUN/step1000, Hugging Face folders or exports; all steps of a run."
    ),
    host: str = typer.Option(
        "127.0.0.1", help="Address to listen on; 0.0.0.0 is reachable from other machines."
    ),
    port: int = typer.Option(8000, help="Port to listen on; 0 takes a free one."),
    api_key: str = typer.Option(
        None, envvar="CASTALIA_API_KEY", help="Ask for this key in Authorization headers."
    ),
    engine: str = typer.Option("auto", help="auto, native, torch, ct2, llama.cpp or openvino."),
    dtype: str = typer.Option(
        None,
        help="auto (int8, the fastest on a CPU), fp32, bf16, fp16, int8 or int4.",
        show_default="fp32",
    ),
    slots: int = typer.Option(16, min=1, help="Texts that are continued at a time; more wait."),
    queue: int = typer.Option(
        256, min=1, help="Texts that may wait; then clients are told to come back (429)."
    ),
    keep: int = typer.Option(
        1, min=1, help="Models in memory at a time; the one idle longest makes room."
    ),
    max_body: int = typer.Option(8, min=1, help="Largest request, in MiB."),
    patience: float = typer.Option(30.0, min=0.1, help="Seconds in which a request must arrive."),
    grace: int = typer.Option(
        30, min=0, help="Seconds that running requests get when the server is stopped."
    ),
) -> None:
    """Serve models over OpenAI's API: /v1/completions, /v1/chat/completions, /v1/models, /health, /metrics.

    Examples:

      castalia serve runs/demo

      castalia serve runs/pythia-70m runs/pythia-160m --keep 2 --port 8080 --api-key secret
    """
    from castalia.core.extras import require

    uvicorn = require("uvicorn", "serve", "castalia serve")
    require("fastapi", "serve", "castalia serve")
    from castalia.serve.app import make_app
    from castalia.serve.model_pool import ModelPool, ServeOptions

    pool = ModelPool(models, ServeOptions(engine, dtype, slots, queue, keep))
    app = make_app(pool, api_key=api_key, most_bytes=max_body << 20, patience=patience)
    if host not in ("127.0.0.1", "localhost", "::1") and not api_key:
        typer.echo(
            f"castalia: warning: {host} is reachable from other machines and there is no --api-key",
            err=True,
        )
    typer.echo(f"castalia: serving {', '.join(pool.locations)} on http://{host}:{port}", err=True)
    uvicorn.run(app, host=host, port=port, log_level="warning", timeout_graceful_shutdown=grace)
