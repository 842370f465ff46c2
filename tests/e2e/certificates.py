"""Certificate authorities and certificates, made with the commands of docs/security.md."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

NEW_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-noenc")


class Authority:
    """One CA; its own certificate is `crt`."""

    def __init__(self, folder: Path, name: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._name = name
        self.crt = folder / f"{name}.crt"
        self._key = folder / f"{name}.key"
        _openssl(*NEW_KEY, "-days", "2", "-subj", f"/CN={name}", "-keyout", self._key, "-out", self.crt)

    def issue(self, name: str, *, alternative: str, usage: str) -> tuple[Path, Path]:
        """Certificate and key. `alternative`: subject alternative name (`DNS:…`); `usage`: serverAuth | clientAuth."""
        crt, key = (self._folder / f"{self._name}-{name}.{suffix}" for suffix in ("crt", "key"))
        _openssl(
            *("-CA", self.crt, "-CAkey", self._key, *NEW_KEY, "-days", "1", "-subj", f"/CN={name}"),
            *("-addext", "basicConstraints=critical,CA:FALSE", "-addext", f"subjectAltName={alternative}"),
            *("-addext", f"extendedKeyUsage={usage}", "-keyout", key, "-out", crt),
        )
        return crt, key


def put(source: Path, target: Path) -> None:
    """Replace a file in one step, as `mv` does: Envoy watches for that."""
    fresh = target.with_name(f".{target.name}.new")
    fresh.write_bytes(source.read_bytes())
    os.replace(fresh, target)


def _openssl(*arguments: object) -> None:
    openssl = shutil.which("openssl") or pytest.skip("makes certificates with openssl, which is not installed")
    subprocess.run([openssl, "req", "-x509", *map(str, arguments)], check=True, capture_output=True)
