"""The command `castalia`: one file a verb; a thin door that parses, calls and prints."""

import sys
import warnings


def show_warning(message: Warning | str, *place: object) -> None:
    """Print a warning as one line for a user, without the line of code that raised it."""
    print(f"castalia: warning: {message}", file=sys.stderr, flush=True)


def main() -> None:
    """Run the command line. A user's mistake prints one sentence on stderr and exits non-zero."""
    from castalia.core.starter import end_with_starter

    # Before the imports of a verb, which take seconds in which a launcher may die.
    end_with_starter()
    from castalia.cli.app import app
    from castalia.core.errors import CastaliaError

    warnings.showwarning = show_warning  # type: ignore[assignment]
    try:
        # The name under `python -m castalia` too: a completion script makes a function of it.
        app(prog_name="castalia")
    except CastaliaError as error:
        # In one write: ranks share a terminal, and print ends a line with a second one.
        sys.stderr.write(f"castalia: error: {error}\n")
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("castalia: interrupted", file=sys.stderr)
        sys.exit(130)
    except SystemExit as end:
        if end.code == 130:  # typer has turned Ctrl-C into an exit already
            print("castalia: interrupted", file=sys.stderr)
        raise
    except BrokenPipeError:
        sys.exit(141)  # 128 + SIGPIPE, as a shell reports `castalia … | head`
    except OSError as error:
        # A file that a verb was given is unreadable or has too long a name; an error without a file
        # name is a fault of ours and keeps its traceback.
        if error.filename is None:
            raise
        sys.stderr.write(f"castalia: error: {error.filename}: {error.strerror}\n")
        sys.exit(1)
