"""`strongroom login`: fetches an access token from the company's identity provider and keeps it fresh."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from server.auth.login import MIN_LEFT_S, Login, Tokens, load_tokens, save_tokens
from server.errors import ConfigError, PermissionDeniedError
from server.types import Secret

if TYPE_CHECKING:
    import argparse

HELP = "Log in at the company's identity provider and print or keep the token."
EPILOG = """examples:
  strongroom login --issuer https://id.example.com --client-id strongroom-ide --scope "openid strongroom.use"
  export OPENAI_API_KEY=$(strongroom login --print)
  STRONGROOM_CLIENT_SECRET=... strongroom login --robot --issuer https://id.example.com --client-id ci --print

With --print a token that is kept and still good is printed at once, and one that is about to end is renewed: an IDE may
run it as its key command."""
SECRET_VARIABLE = "STRONGROOM_CLIENT_SECRET"  # noqa: S105  # the name of a variable, not a secret


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument("--issuer", help="address of the identity provider (kept from the last time)")
    parser.add_argument("--client-id", help="who this is to the provider (kept from the last time)")
    parser.add_argument("--scope", default="openid offline_access strongroom.use", help="what to ask for")
    parser.add_argument("--ca", type=Path, help="certificates to check the provider's with")
    parser.add_argument(
        "--robot", action="store_true", help=f"prove by the secret in {SECRET_VARIABLE}, without a person"
    )
    parser.add_argument("--file", type=Path, default=Path("~/.config/strongroom/token.json"), help="where to keep it")
    parser.add_argument(
        "--print", action="store_true", dest="show", help="print the token, and nothing else, on stdout"
    )
    parser.add_argument("--json", action="store_true", help="print when the token ends as JSON")


def run(args: argparse.Namespace) -> int:
    """Log in, renew, or print what is kept."""
    path = args.file.expanduser()
    kept = load_tokens(path)
    issuer: str | None = args.issuer or (kept.issuer if kept is not None else None)
    client_id: str | None = args.client_id or (kept.client_id if kept is not None else None)
    if issuer is None or client_id is None:
        raise ConfigError("Nobody has logged in here yet; give --issuer and --client-id.")
    if kept is not None and (kept.issuer, kept.client_id) != (issuer, client_id):
        kept = None
    if kept is None or not args.show or kept.expires_at_s - time.time() < MIN_LEFT_S:
        kept = _fetch(args, issuer, client_id, kept)
        save_tokens(path, kept)
    if args.show:
        print(kept.access_token)
    elif args.json:
        print(json.dumps({"expires_at_s": kept.expires_at_s, "file": str(path)}))
    else:
        minutes = int(kept.expires_at_s - time.time()) // 60
        print(f"Logged in for {minutes} minutes; 'strongroom login --print' gives the token and renews it.")
    return 0


def _fetch(args: argparse.Namespace, issuer: str, client_id: str, kept: Tokens | None) -> Tokens:
    login = Login(issuer, client_id, scope=args.scope, ca=args.ca)
    if args.robot:
        secret = os.environ.get(SECRET_VARIABLE)
        if not secret:
            raise ConfigError(f"Set {SECRET_VARIABLE} to the client's secret; it is never taken from the command line.")
        return login.as_robot(Secret(secret))
    if kept is not None and kept.refresh_token is not None and args.show:
        try:
            return login.renew(kept.refresh_token)
        except PermissionDeniedError:
            print("The login has ended; a new one is needed.", file=sys.stderr)

    def show(url: str, code: str) -> None:
        print(f"Open {url} and check that it shows {code}.", file=sys.stderr, flush=True)

    return login.as_person(show)
