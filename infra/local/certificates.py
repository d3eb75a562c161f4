"""A certificate authority of one: the store's gRPC ports answer only to a client with this one certificate."""

from __future__ import annotations

import datetime
import ipaddress
from pathlib import Path

from infra.local.state import write_private

__all__ = ["ensure_certificates"]

YEARS = 20


def ensure_certificates(folder: Path) -> tuple[Path, Path, Path]:
    """Paths of authority, certificate and key; generated once. The authority's own key is not kept."""
    authority_path, certificate_path, key_path = (folder / name for name in ("ca.pem", "grpc.pem", "grpc.key"))
    if not certificate_path.exists():  # Written last.
        from cryptography import x509
        from cryptography.hazmat.primitives import hashes, serialization
        from cryptography.hazmat.primitives.asymmetric import ec
        from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

        now = datetime.datetime.now(datetime.UTC)

        def builder(common_name: str, public_key: ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
            return (
                x509.CertificateBuilder()
                .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)]))
                .issuer_name(issuer)
                .public_key(public_key)
                .serial_number(x509.random_serial_number())
                .not_valid_before(now - datetime.timedelta(days=1))
                .not_valid_after(now + datetime.timedelta(days=365 * YEARS))
            )

        issuer = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "vit embedded store authority")])
        authority_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
        authority = (
            builder("vit embedded store authority", authority_key.public_key())
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .sign(authority_key, hashes.SHA256())
        )
        both = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
        names = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
        certificate = (
            builder("vit embedded store", key.public_key())
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .add_extension(x509.ExtendedKeyUsage(both), critical=False)
            .sign(authority_key, hashes.SHA256())
        )
        pem = serialization.Encoding.PEM
        write_private(authority_path, authority.public_bytes(pem))
        write_private(key_path, key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()))
        write_private(certificate_path, certificate.public_bytes(pem))
    return authority_path, certificate_path, key_path
