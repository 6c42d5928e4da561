"""An authority of our own for a cluster of tests, and the certificates that it signs."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec


@dataclass(frozen=True)
class Subject:
    """Whom a certificate is for: a client of the API, and where it has `addresses` or `names` a server as well."""

    common_name: str
    organization: str | None = None
    addresses: tuple[str, ...] = ()
    names: tuple[str, ...] = ()


def write_certificates(folder: Path, subjects: Mapping[str, Subject]) -> None:
    """Write `ca`, one pair of key and certificate for each subject by its file's name, and the key that signs accounts
    (`accounts.key`, `accounts.pub`)."""
    authority = ec.generate_private_key(ec.SECP256R1())
    issuer = _name(Subject("fastserve-test"))
    basic = x509.BasicConstraints(ca=True, path_length=None)
    own = _builder(issuer, issuer, authority.public_key()).add_extension(basic, critical=True)
    _write(folder, "ca", authority, own.sign(authority, hashes.SHA256()))
    for file, subject in subjects.items():
        key = ec.generate_private_key(ec.SECP256R1())
        builder = _builder(_name(subject), issuer, key.public_key())
        usages = [x509.oid.ExtendedKeyUsageOID.CLIENT_AUTH]
        if subject.addresses or subject.names:
            usages.append(x509.oid.ExtendedKeyUsageOID.SERVER_AUTH)
            places: list[x509.GeneralName] = [x509.DNSName(name) for name in subject.names]
            places += [x509.IPAddress(ipaddress.ip_address(address)) for address in subject.addresses]
            builder = builder.add_extension(x509.SubjectAlternativeName(places), critical=False)
        builder = builder.add_extension(x509.ExtendedKeyUsage(usages), critical=False)
        _write(folder, file, key, builder.sign(authority, hashes.SHA256()))
    accounts = ec.generate_private_key(ec.SECP256R1())
    _write(folder, "accounts", accounts, None)
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    (folder / "accounts.pub").write_bytes(accounts.public_key().public_bytes(serialization.Encoding.PEM, form))


def kubeconfig(folder: Path, user: str, server: str) -> dict[str, Any]:
    """The kubeconfig of a subject."""
    files = {"client-certificate": str(folder / f"{user}.crt"), "client-key": str(folder / f"{user}.key")}
    return {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "test",
        "contexts": [{"name": "test", "context": {"cluster": "test", "user": user}}],
        "clusters": [{"name": "test", "cluster": {"server": server, "certificate-authority": str(folder / "ca.crt")}}],
        "users": [{"name": user, "user": files}],
    }


def _name(subject: Subject) -> x509.Name:
    parts = [x509.NameAttribute(x509.oid.NameOID.COMMON_NAME, subject.common_name)]
    if subject.organization is not None:
        parts.insert(0, x509.NameAttribute(x509.oid.NameOID.ORGANIZATION_NAME, subject.organization))
    return x509.Name(parts)


def _builder(subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(days=2))
    )


def _write(folder: Path, name: str, key: ec.EllipticCurvePrivateKey, certificate: x509.Certificate | None) -> None:
    encoding = serialization.Encoding.PEM
    private = key.private_bytes(encoding, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (folder / f"{name}.key").write_bytes(private)
    if certificate is not None:
        (folder / f"{name}.crt").write_bytes(certificate.public_bytes(encoding))
