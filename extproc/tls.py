"""TLS of the gRPC port: certificate, key and client CA from files, which are read again when they change.

gRPC asks for the current certificate before each handshake, so a new one is for new connections; those there are go on.
"""

import logging
import ssl
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from extproc.config import Config
from extproc.errors import ConfigError
from extproc.file_version import FileVersion, file_version

log = logging.getLogger(__name__)

READ_ATTEMPTS = 3
"""Reads of files that somebody is just writing, before the next handshake is left to try."""


@dataclass(frozen=True, slots=True)
class CertificateFiles:
    """Where the PEM files are."""

    cert: Path
    """The certificate, then those between it and the CA."""
    key: Path
    """Not encrypted: there is nobody to ask for a password."""
    client_ca: Path | None
    """With it clients need a certificate that it, or an authority in it, has signed (mTLS)."""

    def versions(self) -> tuple[FileVersion | None, ...]:
        """Of all files; None for one that is not there."""
        return tuple(_version(path) for path in (self.cert, self.key, self.client_ca) if path)


def server_certificates(config: Config) -> "ServerCertificates | None":
    """What the configuration names; None without TLS. Raises ConfigError for files that cannot be used."""
    if config.grpc_tls_cert is None or config.grpc_tls_key is None:
        return None
    client_ca = Path(config.grpc_tls_client_ca) if config.grpc_tls_client_ca else None
    return ServerCertificates(CertificateFiles(Path(config.grpc_tls_cert), Path(config.grpc_tls_key), client_ca))


class ServerCertificates:
    """The certificates of one gRPC server. Must live as long as the server does: gRPC calls it.

    A change that cannot be used (a file missing, a key of another certificate) is logged once, and what there was
    before is used on: so it does not matter in which order certificate and key are replaced.
    """

    def __init__(self, files: CertificateFiles) -> None:
        """Raises ConfigError, which says what to do."""
        self._files = files
        self._versions = files.versions()
        self._lock = threading.Lock()
        self.credentials = grpc.dynamic_ssl_server_credentials(
            _read(files), self._changed, require_client_authentication=files.client_ca is not None
        )
        """For `Server.add_secure_port`."""

    def __repr__(self) -> str:
        return f"<ServerCertificates {self._files}>"

    def context(self) -> ssl.SSLContext:
        """For a listener of asyncio: HTTP/2 by ALPN, with the files as they are when a client connects."""
        listening = self._latest = _context(self._files)
        listening.sni_callback = self._use_latest
        return listening

    def _use_latest(self, connection: ssl.SSLObject | ssl.SSLSocket, _name: object, _context_of: object) -> None:
        # OpenSSL asks this in each handshake, whether or not the client names a server.
        if self._changed() is not None:
            self._latest = _context(self._files)
        connection.context = self._latest

    def _changed(self) -> Any:
        """The certificates if they are new, else None. gRPC calls it from threads of its own; must not raise."""
        with self._lock:
            for _ in range(READ_ATTEMPTS):
                before = self._files.versions()
                if before == self._versions:
                    return None
                try:
                    configuration, wrong = _read(self._files), None
                except ConfigError as error:
                    configuration, wrong = None, error
                if self._files.versions() == before:
                    self._versions = before
                    if wrong:
                        log.error("new TLS files cannot be used, those before are used on: %s", wrong)
                    else:
                        log.info("new TLS certificate read from %s", self._files.cert)
                    return configuration
            return None


def _context(files: CertificateFiles) -> ssl.SSLContext:
    """asyncio's form of the files' content, which was found to be usable."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["h2"])
    context.load_cert_chain(files.cert, files.key)
    if files.client_ca:
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(files.client_ca)
    return context


def _read(files: CertificateFiles) -> Any:
    """gRPC's form of the files' content. Raises ConfigError."""
    cert = _content("--grpc-tls-cert", files.cert)
    key = _content("--grpc-tls-key", files.key)
    client_ca = _content("--grpc-tls-client-ca", files.client_ca) if files.client_ca else None
    _check_pair(files)
    if client_ca is not None:
        _check_authority(files.client_ca, client_ca)
    return grpc.ssl_server_certificate_configuration([(key, cert)], client_ca)


def _check_pair(files: CertificateFiles) -> None:
    """gRPC itself would say only that a handshake failed."""
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(files.cert, files.key, password=_no_password)
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise ConfigError(
                f"--grpc-tls-key: {files.key} is not the key of the certificate {files.cert}: name the two that were "
                "made together (the first certificate in the file must be the server's own)"
            ) from None
        raise ConfigError(
            f"--grpc-tls-cert, --grpc-tls-key: {files.cert} and {files.key} must be a PEM certificate chain and its "
            f"PEM key: {error.reason or error}"
        ) from None
    except OSError as error:
        raise ConfigError(f"--grpc-tls-cert, --grpc-tls-key: {error.strerror}") from None
    except _EncryptedKeyError:
        raise ConfigError(
            f"--grpc-tls-key: {files.key} is encrypted: give one without a password, readable by this user only"
        ) from None


def _check_authority(path: Path | None, content: bytes) -> None:
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_verify_locations(cadata=content.decode())
    except (ssl.SSLError, UnicodeDecodeError, ValueError):
        raise ConfigError(f"--grpc-tls-client-ca: {path} has no PEM certificate of an authority") from None


class _EncryptedKeyError(Exception):
    pass


def _no_password() -> str:
    raise _EncryptedKeyError


def _content(flag: str, path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{flag}: {path}: {error.strerror}") from None


def _version(path: Path) -> FileVersion | None:
    try:
        return file_version(path)
    except OSError:
        return None
