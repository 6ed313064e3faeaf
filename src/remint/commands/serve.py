"""`remint serve`: serve the merged model over HTTP."""

from pathlib import Path
from typing import Annotated

from typer import Option

from remint.core.errors import RemintError, one_line
from remint.core.settings import check_ranges
from remint.runner.options import explaining_ranges


def main(
    model: Annotated[Path | None, Option(help="Folder of the model; default: the pipeline's.")] = None,
    host: Annotated[str, Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, Option(help="Port to listen on.")] = 8000,
    allowed_hosts: Annotated[
        str, Option(metavar="HOST:PORT,…", help="Accepted Host headers; default: the loopback names.")
    ] = "",
    max_new_tokens: Annotated[int, Option(help="Largest max_tokens of a request.")] = 512,
) -> None:
    """Serve the merged model over HTTP, in the format of OpenAI's chat completions, until Ctrl-C."""
    with explaining_ranges():
        check_ranges(
            "serve",
            (0 < port < 65536, "port", port, "must be from 1 to 65535"),
            (1 <= max_new_tokens <= 10**6, "max_new_tokens", max_new_tokens, "must be between 1 and 1000000"),
        )
    # Importing torch takes seconds: check the arguments first.
    from remint.core.paths import Paths
    from remint.runner import memory
    from remint.serving import completions

    with memory.explaining_errors("serve", {}):
        answerer = completions.Answerer(model or Paths().model, max_new_tokens)
        hosts = [name for name in allowed_hosts.split(",") if name]
        try:
            server = completions.serving(answerer, host, port, hosts)
        except OSError as error:
            raise RemintError(
                f"serve: port {port} of {host} is not available ({one_line(error)}); choose another with --port"
            ) from None
        with server:
            url = f"http://{host}:{server.server_port}/v1/chat/completions"
            print(f"serving on {url}, Ctrl-C stops it", flush=True)
            server.serve_forever()
