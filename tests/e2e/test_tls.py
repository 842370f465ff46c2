"""The gRPC connection between a real Envoy and the service: TLS, mTLS, new certificates, the unix socket."""

import os
import signal
import ssl
import stat
import subprocess

import httpx
import pytest
from certificates import Authority, put
from conftest import until
from split_gateway import Engines, SplitGateway, extproc, killed

from extproc.config import Config
from extproc.envoy_config import bootstrap, secret_files
from extproc.errors import ConfigError
from extproc.tls import server_certificates

pytestmark = pytest.mark.envoy

NAME = "extproc.internal"


@pytest.fixture(scope="module")
def engines(tmp_path_factory):
    with Engines(tmp_path_factory.mktemp("engines"), ["--time-scale", "10"]) as engines:
        yield engines


@pytest.fixture(scope="module")
def authorities(tmp_path_factory):
    folder = tmp_path_factory.mktemp("authorities")
    return Authority(folder, "first"), Authority(folder, "second")


class Certificates:
    """The files that the settings name, in one folder; what is in them may change."""

    def __init__(self, folder):
        folder.mkdir()
        self.folder = folder
        self.service = {
            "grpc_tls_cert": str(folder / "service.crt"),
            "grpc_tls_key": str(folder / "service.key"),
        }
        self.client_ca = {"grpc_tls_client_ca": str(folder / "envoys.crt")}
        self.envoy = {"envoy_tls_ca": str(folder / "services.crt"), "envoy_tls_server_name": NAME}
        self.envoy_own = {
            "envoy_tls_cert": str(folder / "envoy.crt"),
            "envoy_tls_key": str(folder / "envoy.key"),
        }

    def put_service(self, authority, alternative=f"DNS:{NAME}"):
        crt, key = authority.issue("service", alternative=alternative, usage="serverAuth")
        put(crt, self.folder / "service.crt")
        put(key, self.folder / "service.key")

    def put_envoy(self, authority):
        crt, key = authority.issue("envoy", alternative="DNS:envoy", usage="clientAuth")
        put(crt, self.folder / "envoy.crt")
        put(key, self.folder / "envoy.key")

    def put_authorities(self, *, services, envoys):
        put(services.crt, self.folder / "services.crt")
        put(envoys.crt, self.folder / "envoys.crt")


@pytest.fixture
def files(tmp_path, authorities):
    first, _ = authorities
    files = Certificates(tmp_path / "tls")
    files.put_service(first)
    files.put_envoy(first)
    files.put_authorities(services=first, envoys=first)
    return files


def without(settings, names):
    return {name: value for name, value in settings.items() if name not in names}


def refused(gateway):
    """Whether requests get Envoy's own 503, as nobody has scheduled them."""
    response = gateway.ask()
    assert (response.status_code, "x-pd-prefill" in response.headers) == (503, False)
    assert "schedul" in response.json()["error"]["message"]
    return True


def presented(gateway):
    """The certificate that the service shows to a new connection, as PEM."""
    return ssl.get_server_certificate(("127.0.0.1", gateway.grpc_port)).strip()


def test_tls(tmp_path, engines, files):
    gateway = SplitGateway(tmp_path, engines, {**files.service, **files.envoy})
    with gateway.serve():
        with gateway.envoy():
            assert gateway.ask().status_code == 200
        plaintext = without(gateway.settings, {*files.service, *files.envoy})
        with gateway.envoy(plaintext):
            assert refused(gateway)
        with gateway.envoy():
            assert gateway.ask().status_code == 200


def test_tls_to_an_address(tmp_path, engines, files, authorities):
    """Without `envoy_tls_server_name` the certificate must be for the address that Envoy connects to."""
    files.put_service(authorities[0], "IP:127.0.0.1")
    gateway = SplitGateway(tmp_path, engines, {**files.service, "envoy_tls_ca": files.envoy["envoy_tls_ca"]})
    with gateway.serve(), gateway.envoy():
        assert gateway.ask().status_code == 200


@pytest.mark.parametrize("what", ["another authority", "another name"])
def test_envoy_does_not_talk_to_another_service(tmp_path, engines, files, authorities, what):
    first, second = authorities
    if what == "another authority":
        files.put_service(second)
    else:
        files.put_service(first, "DNS:other.internal")
    gateway = SplitGateway(tmp_path, engines, {**files.service, **files.envoy})
    with gateway.serve(), gateway.envoy():
        assert refused(gateway)


def test_mutual_tls(tmp_path, engines, files, authorities):
    _, second = authorities
    gateway = SplitGateway(tmp_path, engines, {**files.service, **files.client_ca, **files.envoy, **files.envoy_own})
    with gateway.serve():
        with gateway.envoy():
            assert gateway.ask().status_code == 200
        nameless = without(gateway.settings, {*files.envoy_own, *files.client_ca})
        with gateway.envoy(nameless):
            assert refused(gateway)
        files.put_envoy(second)
        with gateway.envoy():
            assert refused(gateway)


def test_new_certificates_and_authorities_without_a_restart(tmp_path, engines, files, authorities):
    """Everything is replaced while a stream runs. New connections use what is new, and the stream comes to its end."""
    _, second = authorities
    gateway = SplitGateway(tmp_path, engines, {**files.service, **files.client_ca, **files.envoy, **files.envoy_own})
    old_certificate = (files.folder / "service.crt").read_text().strip()
    body = {"text": "hello", "stream": True, "sampling_params": {"max_new_tokens": 4000}}
    with gateway.envoy(flags=["--secrets", str(tmp_path / "secrets")]):
        with gateway.serve() as service:
            until(lambda: gateway.ask().status_code == 200, "Envoy has connected")
            with httpx.stream("POST", gateway.url + "/generate", json=body, timeout=120) as response:
                lines = (line for line in response.iter_lines() if line)
                next(lines)
                assert presented(gateway) == old_certificate
                updates = secret_updates(gateway)
                files.put_authorities(services=second, envoys=second)
                files.put_service(second)
                files.put_envoy(second)
                new_certificate = (files.folder / "service.crt").read_text().strip()
                assert presented(gateway) == new_certificate != old_certificate
                assert gateway.ask().status_code == 200  # on the connection that was there
                until(lambda: secret_updates(gateway) >= updates + 2, "Envoy has read CA and certificate anew")
                rest = list(lines)
            assert rest[-1] == "data: [DONE]"
            assert "new TLS certificate" in service.log_text
        # A service that starts now knows only the second authority; Envoy connects to it with its new certificate.
        with gateway.serve():
            until(lambda: gateway.ask().status_code == 200, "Envoy has connected anew")


def secret_updates(gateway):
    """How often Envoy has taken new content of its two secrets."""
    text = httpx.get(gateway.admin + "/stats?filter=extproc.*ssl_context_update_by_sds").text
    return sum(int(line.rpartition(": ")[2]) for line in text.splitlines())


def test_certificates_that_do_not_fit_are_not_taken(tmp_path, engines, files, authorities):
    first, _ = authorities
    gateway = SplitGateway(tmp_path, engines, {**files.service, **files.envoy})
    before = (files.folder / "service.crt").read_text().strip()
    with gateway.serve() as service, gateway.envoy():
        crt, key = first.issue("next", alternative=f"DNS:{NAME}", usage="serverAuth")
        put(crt, files.folder / "service.crt")
        assert [presented(gateway) for _ in range(3)] == [before] * 3
        assert service.log_text.count("is not the key of the certificate") == 1
        assert gateway.ask().status_code == 200
        put(key, files.folder / "service.key")
        assert presented(gateway) == crt.read_text().strip()


def encrypt(key):
    command = ["openssl", "pkey", "-in", key, "-aes256", "-passout", "pass:x", "-out", key.with_suffix(".locked")]
    subprocess.run(command, check=True, capture_output=True)
    put(key.with_suffix(".locked"), key)


WRONG_FILES = {
    "encrypted key": (lambda files: encrypt(files.folder / "service.key"), "service.key is encrypted"),
    "no certificate": (lambda files: (files.folder / "service.crt").unlink(), "service.crt: No such file"),
    "no key": (lambda files: (files.folder / "service.key").unlink(), "service.key: No such file"),
    "garbage": (lambda files: (files.folder / "service.crt").write_text("x"), "must be a PEM certificate chain"),
    "no authority": (lambda files: (files.folder / "envoys.crt").write_text("x"), "no PEM certificate of an authority"),
    "other key": (
        lambda files: put(files.folder / "envoy.key", files.folder / "service.key"),
        "service.key is not the key of the certificate",
    ),
}


@pytest.mark.parametrize("case", WRONG_FILES)
def test_wrong_files_are_explained(files, case):
    spoil, message = WRONG_FILES[case]
    spoil(files)
    with pytest.raises(ConfigError, match=message):
        server_certificates(Config(**files.service, **files.client_ca))


@pytest.mark.parametrize("command", ["serve", "check"])
def test_every_command_that_needs_them_says_so(files, command):
    (files.folder / "service.key").unlink()
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in files.service.items()]
    done = extproc(command, "--prefill", "http://127.0.0.1:1", "--decode", "http://127.0.0.1:2", *flags)
    assert done.returncode == 2
    assert done.stderr.startswith("extproc: --grpc-tls-key: ")
    assert "service.key: No such file" in done.stderr


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"grpc_tls_cert": "a", "grpc_tls_key": "b"}, "set envoy_tls_ca"),
        (
            {"grpc_tls_cert": "a", "grpc_tls_key": "b", "grpc_tls_client_ca": "c", "envoy_tls_ca": "d"},
            "set envoy_tls_cert and envoy_tls_key",
        ),
    ],
)
def test_half_an_envoy_is_explained(settings, message):
    with pytest.raises(ConfigError, match=message):
        bootstrap(Config(**settings))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "--secrets is for TLS"),
        ({"envoy_tls_ca": "a", "grpc_uds": "/run/s"}, "--secrets is for TLS"),
        (
            {"envoy_tls_ca": "a", "envoy_tls_cert": "/a/crt", "envoy_tls_key": "/b/key"},
            "watches one folder for both",
        ),
    ],
)
def test_secrets_that_envoy_could_not_watch(settings, message):
    with pytest.raises(ConfigError, match=message):
        secret_files(Config(**settings))


def test_unix_socket(tmp_path, engines):
    path = tmp_path / "extproc.sock"
    gateway = SplitGateway(tmp_path, engines, {"grpc_uds": str(path)})
    with gateway.envoy() as bootstrap:
        assert f"path: {path}" in bootstrap
        with gateway.serve() as service:
            until(lambda: gateway.ask().status_code == 200, "Envoy has connected")
            assert stat.S_IMODE(os.stat(path).st_mode) == 0o660
            second = extproc(
                *("serve", "--grpc-uds", str(path), "--prometheus-port", str(gateway.grpc_port)),
                *("--prefill", engines.urls["prefill"], "--decode", engines.urls["decode"]),
            )
            assert second.returncode == 2
            assert f"another process listens on {path}" in second.stderr
            assert gateway.ask().status_code == 200
            killed(service)
        assert path.exists()  # left over: nobody had the time to remove it
        with gateway.serve() as service:
            until(lambda: gateway.ask().status_code == 200, "Envoy has connected anew")
            service.signal(signal.SIGTERM)
            until(lambda: service.exit_status is not None, "the service has ended")
            assert service.exit_status == 0
        assert not path.exists()


def test_what_is_no_socket_is_not_removed(tmp_path):
    path = tmp_path / "precious"
    path.write_text("content")
    done = extproc(
        "serve", "--prefill", "http://127.0.0.1:1", "--decode", "http://127.0.0.1:2", "--grpc-uds", str(path)
    )
    assert done.returncode == 2
    assert "is there and no socket" in done.stderr
    assert path.read_text() == "content"
