"""What the bootstrap says about TLS to the service."""

from pathlib import PurePosixPath

import pytest
import yaml

from extproc.config import Config
from extproc.envoy_config import bootstrap, secret_files, to_yaml

TLS = {"envoy_tls_ca": "/tls/ca.crt"}
OWN = {"envoy_tls_cert": "/tls/envoy.crt", "envoy_tls_key": "/tls/envoy.key"}


def service_cluster(config, **kwargs):
    static = yaml.safe_load(to_yaml(bootstrap(config, **kwargs)))["static_resources"]
    return next(cluster for cluster in static["clusters"] if cluster["name"] == "extproc")


def tls(config, **kwargs):
    return service_cluster(config, **kwargs)["transport_socket"]["typed_config"]


@pytest.mark.parametrize(
    ("name", "kind", "sni"),
    [
        ("extproc.internal", "DNS", "extproc.internal"),
        ("10.0.0.1", "IP_ADDRESS", None),
        ("::1", "IP_ADDRESS", None),
        ("spiffe://cluster/extproc", "URI", None),
    ],
)
def test_the_service_must_prove_its_name(name, kind, sni):
    socket = tls(Config(**TLS, envoy_tls_server_name=name))
    context = socket["common_tls_context"]["validation_context"]
    assert context["trusted_ca"] == {"filename": "/tls/ca.crt"}
    assert context["match_typed_subject_alt_names"] == [{"san_type": kind, "matcher": {"exact": name}}]
    assert socket.get("sni") == sni


@pytest.mark.parametrize(("target", "name"), [("extproc.internal:9002", "extproc.internal"), ("[::1]:9002", "::1")])
def test_without_a_name_it_is_the_host(target, name):
    context = tls(Config(**TLS), grpc_target=target)["common_tls_context"]["validation_context"]
    assert context["match_typed_subject_alt_names"][0]["matcher"] == {"exact": name}


def test_a_unix_socket_has_no_tls():
    assert "transport_socket" not in service_cluster(Config(**TLS), grpc_target="unix:/run/extproc.sock")
    assert "transport_socket" not in service_cluster(Config())


def test_secrets_are_files_that_hold_paths_only():
    config = Config(**TLS, **OWN)
    folder = PurePosixPath("/etc/envoy/secrets")
    common = tls(config, secrets=folder)["common_tls_context"]
    assert "validation_context" not in common
    assert "tls_certificates" not in common
    [own], authority = common["tls_certificate_sds_secret_configs"], common["validation_context_sds_secret_config"]
    files = {name: yaml.safe_load(to_yaml(content)) for name, content in secret_files(config).items()}
    for secret in (own, authority):
        assert secret["sds_config"]["path_config_source"]["path"] == f"{folder}/{secret['name']}.yaml"
        assert files[f"{secret['name']}.yaml"]["resources"][0]["name"] == secret["name"]
    certificate = files[f"{own['name']}.yaml"]["resources"][0]["tls_certificate"]
    assert certificate == {
        "certificate_chain": {"filename": "/tls/envoy.crt"},
        "private_key": {"filename": "/tls/envoy.key"},
        "watched_directory": {"path": "/tls"},
    }
