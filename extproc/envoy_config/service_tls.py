"""TLS between Envoy and the service: whom Envoy trusts, and what it shows of itself.

With a folder for secrets, both are files there that Envoy watches (SDS): it takes new certificates without a restart.
Without one they are in the bootstrap, and Envoy reads the certificates once, at its start.
"""

from pathlib import PurePosixPath

from envoy_data_plane.envoy.config.core.v3 import (
    ApiVersion,
    ConfigSource,
    DataSource,
    PathConfigSource,
    TransportSocket,
    WatchedDirectory,
)
from envoy_data_plane.envoy.extensions.transport_sockets.tls.v3 import (
    CertificateValidationContext,
    CommonTlsContext,
    SdsSecretConfig,
    Secret,
    SubjectAltNameMatcher,
    SubjectAltNameMatcherSanType,
    TlsCertificate,
    TlsParameters,
    TlsParametersTlsProtocol,
    UpstreamTlsContext,
)
from envoy_data_plane.envoy.service.discovery.v3 import DiscoveryResponse
from envoy_data_plane.envoy.type.matcher.v3 import StringMatcher
from envoy_data_plane.google.protobuf import Any

from extproc.config import Config, is_ip
from extproc.envoy_config.addresses import default_target, target_host
from extproc.errors import ConfigError

SERVICE_CA = "extproc_service_ca"
ENVOY_CERTIFICATE = "extproc_envoy_certificate"
"""Names of the secrets, and of their files with `.yaml` after it."""


def uses_tls(config: Config, target: str) -> bool:
    """Whether Envoy is to use TLS for the service at `target`. A unix socket never has it.

    Raises ConfigError where the service would: Envoy's side of it is missing then.
    """
    if target.startswith("unix:"):
        return False
    if config.grpc_tls_cert and not config.envoy_tls_ca:
        raise ConfigError("grpc_tls_cert: the service takes TLS only, so set envoy_tls_ca, by which Envoy knows it")
    if config.grpc_tls_client_ca and not config.envoy_tls_cert:
        raise ConfigError(
            "grpc_tls_client_ca: the service wants a certificate of Envoy, so set envoy_tls_cert and envoy_tls_key"
        )
    return config.envoy_tls_ca is not None


def transport_socket(config: Config, host: str, secrets: PurePosixPath | None) -> TransportSocket:
    """TLS 1.3 to the service at `host`, which must prove that it is that one (or `envoy_tls_server_name`)."""
    name = config.envoy_tls_server_name or host
    common = CommonTlsContext(
        tls_params=TlsParameters(
            tls_minimum_protocol_version=TlsParametersTlsProtocol.TLSv1_3,
            tls_maximum_protocol_version=TlsParametersTlsProtocol.TLSv1_3,
        ),
        alpn_protocols=["h2"],
    )
    if secrets is None:
        common.validation_context = _service_ca(config, host)
        if config.envoy_tls_cert:
            common.tls_certificates = [_envoy_certificate(config)]
    else:
        common.validation_context_sds_secret_config = _from_file(secrets, SERVICE_CA)
        if config.envoy_tls_cert:
            common.tls_certificate_sds_secret_configs = [_from_file(secrets, ENVOY_CERTIFICATE)]
    # Neither an address nor a URI is a server name (RFC 6066, section 3).
    sni = "" if is_ip(name) or _is_uri(name) else name
    tls = UpstreamTlsContext(common_tls_context=common, sni=sni)
    return TransportSocket(name="envoy.transport_sockets.tls", typed_config=Any.pack(tls))


def secret_files(config: Config, *, grpc_target: str | None = None) -> dict[str, DiscoveryResponse]:
    """The files to put into the folder for secrets, by name; they hold paths only. Raises ConfigError."""
    target = grpc_target or default_target(config)
    if not uses_tls(config, target):
        raise ConfigError("--secrets is for TLS to the service: set envoy_tls_ca, and no unix socket")
    if (
        config.envoy_tls_cert
        and config.envoy_tls_key
        and _parent(config.envoy_tls_cert) != _parent(config.envoy_tls_key)
    ):
        raise ConfigError("envoy_tls_cert and envoy_tls_key: Envoy watches one folder for both, so put them into one")
    host = target_host(target)
    secrets = [Secret(name=SERVICE_CA, validation_context=_service_ca(config, host))]
    if config.envoy_tls_cert:
        secrets.append(Secret(name=ENVOY_CERTIFICATE, tls_certificate=_envoy_certificate(config)))
    return {f"{secret.name}.yaml": DiscoveryResponse(resources=[Any.pack(secret)]) for secret in secrets}


def _service_ca(config: Config, host: str) -> CertificateValidationContext:
    name = config.envoy_tls_server_name or host
    if _is_uri(name):
        kind = SubjectAltNameMatcherSanType.URI
    else:
        kind = SubjectAltNameMatcherSanType.IP_ADDRESS if is_ip(name) else SubjectAltNameMatcherSanType.DNS
    return CertificateValidationContext(
        trusted_ca=_file(config.envoy_tls_ca),
        watched_directory=_folder(config.envoy_tls_ca),
        match_typed_subject_alt_names=[SubjectAltNameMatcher(san_type=kind, matcher=StringMatcher(exact=name))],
    )


def _envoy_certificate(config: Config) -> TlsCertificate:
    return TlsCertificate(
        certificate_chain=_file(config.envoy_tls_cert),
        private_key=_file(config.envoy_tls_key),
        watched_directory=_folder(config.envoy_tls_cert),
    )


def _from_file(secrets: PurePosixPath, name: str) -> SdsSecretConfig:
    source = PathConfigSource(path=str(secrets / f"{name}.yaml"))
    return SdsSecretConfig(
        name=name, sds_config=ConfigSource(path_config_source=source, resource_api_version=ApiVersion.V3)
    )


def _file(path: str | None) -> DataSource | None:
    return DataSource(filename=path) if path else None


def _folder(path: str | None) -> WatchedDirectory | None:
    """Envoy looks for files that are moved into it, so also for the symbolic link that Kubernetes swaps there."""
    return WatchedDirectory(path=_parent(path)) if path else None


def _parent(path: str) -> str:
    return str(PurePosixPath(path).parent)


def _is_uri(name: str) -> bool:
    """`spiffe://…`, say."""
    return "://" in name
