"""`snapd certs ca | node | show`: certificates for the daemons of tests and small clusters."""

from __future__ import annotations

import datetime
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from snapd.cli.options import JsonOption
from snapd.cli.outcome import ExitCode, reports_errors
from snapd.cli.output import facts, print_json, print_parts
from snapd.core.cluster import checked_node_name
from snapd.errors import ConfigError

if TYPE_CHECKING:
    from cryptography import x509

    from snapd.peer.certificates import Issued

DAYS_MAX = 36_500
CA_NAME = "ca"

app = typer.Typer(
    no_args_is_help=True, help="Make and look at the certificates that daemons show each other."
)

DirOption = Annotated[Path, typer.Option("--dir", help="Folder of the files.")]
DaysOption = Annotated[int, typer.Option("--days", min=1, max=DAYS_MAX, help="How long it is valid.")]
ForceOption = Annotated[bool, typer.Option("--force", help="Replace files that are there.")]


def ca(
    directory: DirOption = Path(),
    name: Annotated[str, typer.Option("--name", help="What it calls itself.")] = "snapd CA",
    days: DaysOption = 3650,
    force: ForceOption = False,
) -> ExitCode:
    """Make an authority: ca.crt for every node, ca.key for whoever makes certificates (keep it off the nodes)."""
    _check_cryptography()
    from snapd.peer.certificates import make_ca

    made = make_ca(name, _now(), datetime.timedelta(days=days))
    for path in _write(directory, CA_NAME, made, force=force):
        print(path)
    return ExitCode.DONE


def node(
    name: Annotated[str, typer.Argument(help="The node's name, as in cluster.node.", metavar="NODE")],
    directory: DirOption = Path(),
    also: Annotated[
        list[str] | None,
        typer.Option("--name", help="A further DNS name or IP address (repeatable).", show_default=False),
    ] = None,
    days: DaysOption = 365,
    force: ForceOption = False,
) -> ExitCode:
    """Make NODE.crt and NODE.key, signed by the folder's authority."""
    _check_cryptography()
    from snapd.peer.certificates import Issued, make_node

    checked_node_name(name)
    if name == CA_NAME:
        raise ConfigError(
            f"{CA_NAME} is the authority's name here", kind="node_name", hint="use another --dir"
        )
    authority = Issued(_read(directory / f"{CA_NAME}.crt"), _read(directory / f"{CA_NAME}.key"))
    try:
        made = make_node(authority, name, _now(), datetime.timedelta(days=days), also=also or ())
    except (ValueError, TypeError) as error:
        raise ConfigError(
            f"cannot sign with {directory / CA_NAME}.key: {str(error).splitlines()[0]}",
            kind="certificate_files",
        ) from error
    for path in _write(directory, name, made, force=force):
        print(path)
    return ExitCode.DONE


def show(
    files: Annotated[list[Path], typer.Argument(help="Certificates in PEM.", metavar="FILE...")],
    as_json: JsonOption = False,
) -> ExitCode:
    """Show for whom certificates are, who made them, and until when they are valid. Ends with 3 if one is not."""
    _check_cryptography()
    now = _now()
    found = [(path, certificate) for path in files for certificate in _certificates(path)]
    if as_json:
        print_json([certificate_json(path, certificate, now) for path, certificate in found])
    else:
        for path, certificate in found:
            print_parts(facts(certificate_facts(path, certificate, now)), "")
    is_valid = all(validity_problem(certificate, now) == "" for _, certificate in found)
    return ExitCode.DONE if is_valid else ExitCode.UNUSABLE


def certificate_facts(path: Path, certificate: x509.Certificate, now: datetime.datetime) -> dict[str, str]:
    """Names and values of one certificate."""
    from snapd.peer.certificates import is_authority, names_of

    until = certificate.not_valid_after_utc
    problem = validity_problem(certificate, now)
    return {
        "file": str(path),
        "for": "an authority" if is_authority(certificate) else ", ".join(names_of(certificate)) or "nobody",
        "subject": certificate.subject.rfc4514_string(),
        "made by": certificate.issuer.rfc4514_string(),
        "valid": f"{certificate.not_valid_before_utc:%Y-%m-%d %H:%M} .. {until:%Y-%m-%d %H:%M} UTC"
        + (f" ({problem})" if problem else f" ({(until - now).days} days left)"),
    }


def certificate_json(path: Path, certificate: x509.Certificate, now: datetime.datetime) -> dict[str, object]:
    """One certificate of the JSON; moments in seconds since 1970."""
    from snapd.peer.certificates import is_authority, names_of

    return {
        "file": str(path),
        "is_authority": is_authority(certificate),
        "names": names_of(certificate),
        "subject": certificate.subject.rfc4514_string(),
        "issuer": certificate.issuer.rfc4514_string(),
        "not_before_s": certificate.not_valid_before_utc.timestamp(),
        "not_after_s": certificate.not_valid_after_utc.timestamp(),
        "problem": validity_problem(certificate, now) or None,
    }


def validity_problem(certificate: x509.Certificate, now: datetime.datetime) -> str:
    """Why it is not valid at that moment; empty if it is."""
    if now < certificate.not_valid_before_utc:
        return "not yet valid"
    return "expired" if now > certificate.not_valid_after_utc else ""


def _certificates(path: Path) -> list[x509.Certificate]:
    from cryptography import x509

    try:
        return x509.load_pem_x509_certificates(_read(path))
    except ValueError as error:
        raise ConfigError(f"{path} holds no certificate in PEM", kind="certificate_files") from error


def _check_cryptography() -> None:
    try:
        import cryptography  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            "the package cryptography is not installed", kind="extra", hint="pip install 'snapd[certs]'"
        ) from error


def _write(directory: Path, name: str, made: Issued, *, force: bool) -> tuple[Path, Path]:
    """Write NAME.crt and NAME.key, the key for its owner alone; nothing is written if one of them is there."""
    paths = (directory / f"{name}.crt", directory / f"{name}.key")
    present = [str(path) for path in paths if path.exists()]
    if present and not force:
        raise ConfigError(
            f"{' and '.join(present)} {'is' if len(present) == 1 else 'are'} there already",
            kind="exists",
            hint="--force replaces, also the key",
        )
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for path, content, mode in ((paths[1], made.key, 0o600), (paths[0], made.certificate, 0o644)):
            _replace(path, content, mode)
    except OSError as error:
        raise ConfigError(
            f"cannot write {name}.crt and {name}.key in {directory}: {error.strerror}",
            kind="certificate_files",
        ) from error
    return paths


def _replace(path: Path, content: bytes, mode: int) -> None:
    """Put a file in place whole: a daemon may be looking at it."""
    new = path.with_name(f".{path.name}.new")
    new.unlink(missing_ok=True)
    descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
    new.replace(path)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        hint = "snapd certs ca makes an authority" if path.stem == CA_NAME else ""
        raise ConfigError(
            f"{path} cannot be read: {error.strerror}", kind="certificate_files", hint=hint
        ) from error


def _now() -> datetime.datetime:
    return datetime.datetime.fromtimestamp(time.time(), datetime.UTC)


app.command("ca")(reports_errors(ca))
app.command("node")(reports_errors(node))
app.command("show")(reports_errors(show))
