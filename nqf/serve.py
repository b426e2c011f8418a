"""`python -m nqf.serve`: a trained run as a service, with a page to click through."""

from __future__ import annotations

import ipaddress
import logging
import os
import sys
from pathlib import Path
from typing import Annotated, Literal

import tyro

from nqf.cli import guard, parse, program, terminal
from nqf.config import Count, section


@section
class ServeArguments:
    """Serves a trained run over HTTP: JSON endpoints (/docs), metrics, and a page to click through (/).

    With NQF_TOKEN in the environment, that token is asked for (`Authorization: Bearer TOKEN`).

    Attributes:
      run: Run folder, or its address (`gs://`, `s3://`, ...).
      host: Address to listen on; by default this machine alone.
      port: Port to listen on, which has to be free.
      stage: `joint`, or `user` for the User Q-Former without the language model.
      index: `exact`, or `approximate` for an index of the items, which pays from some hundred thousand items on.
      read_only: Refuse to add, update and remove items, as is always done where the run is at an address.
      public_name: Name by which the service is reached, where it is not that of this machine; to be given once for
        each.
      debug: Show the traceback of an error.
    """

    run: Annotated[str | Path, tyro.conf.Positional]
    host: str = "127.0.0.1"
    port: Count = 8000
    stage: str = "joint"
    index: Literal["exact", "approximate"] = "exact"
    read_only: bool = False
    public_name: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    debug: bool = False


def main(arguments: list[str]) -> None:
    """Runs the command."""
    options = parse(ServeArguments, arguments, prog=program("serve"))
    try:
        import uvicorn

        from nqf.serving.app import make_app
    except ModuleNotFoundError as error:
        raise RuntimeError(f"{error.name} is not installed; pip install 'nqf[serve]'") from None
    from nqf.files import is_address, masked
    from nqf.serving.service import Service
    from nqf.stages.remote import local_run

    console = terminal()
    logging.basicConfig(format="%(message)s", force=True)
    logging.getLogger("nqf").setLevel(logging.INFO)
    token = os.environ.get("NQF_TOKEN", "")
    local = options.host == "localhost" or ipaddress.ip_address(options.host).is_loopback
    if not local and not token:
        console.print(
            f"warning  {options.host} is reached from other machines and no NQF_TOKEN is set: whoever reaches it may "
            "ask, and change items unless --read-only is given",
            markup=False,
        )
    name = masked(str(options.run))
    console.print(f"loading {name} … (the first time, programs are compiled: a minute or more)", markup=False)
    # A change would stay in the copy.
    remote = is_address(str(options.run))
    with local_run(options.run) as (folder, _):
        writable = not (options.read_only or remote)
        service = Service(folder, stage=options.stage, writable=writable, index=options.index)
    service.warm()
    if remote:
        console.print(
            "the run is at an address, of which a copy is served as it is now: change items with nqf items, and start "
            "this again to see what has changed",
            markup=False,
        )
    names = ("localhost", "127.0.0.1", "[::1]", options.host, *options.public_name)
    names = names if local or options.public_name else ("*",)
    console.print(f"http://{options.host}:{options.port}  page; /docs  endpoints; Ctrl-C ends it", markup=False)
    uvicorn.run(
        make_app(service, token=token, hosts=names),
        host=options.host,
        port=options.port,
        log_level="warning",
        access_log=False,
        server_header=False,
        limit_concurrency=2_048,
        timeout_keep_alive=15,
        timeout_graceful_shutdown=10,
    )


if __name__ == "__main__":
    guard(main, sys.argv[1:])
