"""S3 over https: the endpoint's certificate is verified, against the system's authorities or the user's own."""

from __future__ import annotations

import datetime
import ipaddress
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import boto3
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

from streamshards import ShardWriter, StoreError, StreamingDataset


class Endpoint(NamedTuple):
    url: str
    certificate: Path


def _make_certificate(folder: Path) -> tuple[Path, Path]:
    """Return the files of a self-signed certificate for 127.0.0.1 and of its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.datetime.now(datetime.timezone.utc)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    certificate_file, key_file = folder / "certificate.pem", folder / "key.pem"
    certificate_file.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    key_file.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return certificate_file, key_file


@pytest.fixture
def endpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Endpoint]:
    certificate, key = _make_certificate(tmp_path)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
    application = DomainDispatcherApplication(create_backend_app)
    server = make_server("127.0.0.1", 0, application, threaded=True, ssl_context=(str(certificate), str(key)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    url = f"https://127.0.0.1:{server.port}"
    try:
        client = boto3.client("s3", endpoint_url=url, region_name="us-east-1", verify=str(certificate))
        client.create_bucket(Bucket="bucket")
        client.close()
        yield Endpoint(url, certificate)
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_https_with_an_authority_of_ones_own(endpoint: Endpoint) -> None:
    """A certificate that the user trusts is enough: written and read over https."""
    options = {"endpoint_url": endpoint.url, "client_kwargs": {"verify": str(endpoint.certificate)}}
    with ShardWriter("s3://bucket/train", storage_options=options) as out:
        out.write({"id": 1})
    assert list(StreamingDataset("s3://bucket/train", storage_options=options)) == [{"id": 1}]


def test_a_certificate_nobody_vouches_for_is_refused(endpoint: Endpoint) -> None:
    """No silent fallback, and no retries: the error says that the certificate is not trusted, and what to set."""
    with pytest.raises(StoreError, match=r"not trusted: set AWS_CA_BUNDLE"):
        StreamingDataset("s3://bucket/train", storage_options={"endpoint_url": endpoint.url})
