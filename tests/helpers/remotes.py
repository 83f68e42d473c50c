"""Remotes for DVC as tests need them: a folder, a real sshd on this host, moto's server of S3."""

import importlib.util
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.helpers.checkout import Checkout
from tests.helpers.waiting import wait_until

SSHD = shutil.which("sshd") or "/usr/sbin/sshd"
CONFIGURATION = """
Port {port}
ListenAddress 127.0.0.1
HostKey {place}/host_key
AuthorizedKeysFile {place}/user_key.pub
PidFile {place}/sshd.pid
StrictModes no
PasswordAuthentication no
PermitRootLogin prohibit-password
Subsystem sftp internal-sftp
"""


@dataclass
class Remote:
    """A remote: its address; what each user sets with `--local`; how to damage it."""

    url: str
    settings: dict[str, str]
    cut: Callable[[str], None]  # the object of this MD5 loses its end, as by an interrupted push

    def add(self, checkout: Checkout) -> None:
        checkout.run("dvc", "remote", "add", "--default", "--force", "storage", self.url)
        for key, value in self.settings.items():
            checkout.run("dvc", "remote", "modify", "--local", "storage", key, value)


def object_path(md5: str) -> str:
    """Where a remote keeps an object."""
    return f"files/md5/{md5[:2]}/{md5[2:]}"


def cut_file(place: Path, md5: str) -> None:
    path = place / object_path(md5)
    path.chmod(0o644)
    path.write_bytes(path.read_bytes()[:-100])


@contextmanager
def folder(place: Path) -> Iterator[Remote]:
    yield Remote(str(place / "remote"), {}, lambda md5: cut_file(place / "remote", md5))


@contextmanager
def ssh(place: Path) -> Iterator[Remote]:
    """A folder of this host by way of an sshd of its own, with a key of its own."""
    _needs("dvc_ssh")
    if not Path(SSHD).exists() or os.geteuid() != 0:
        pytest.skip("needs root and Debian's openssh-server")
    for name in ("host_key", "user_key"):
        words = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(place / name)]
        subprocess.run(words, check=True)
    port = _free_port()
    (place / "sshd_config").write_text(CONFIGURATION.format(port=port, place=place))
    Path("/run/sshd").mkdir(exist_ok=True)
    process = subprocess.Popen([SSHD, "-D", "-f", str(place / "sshd_config")])
    try:
        _wait_for(port)
        remote = place / "remote"
        settings = {"keyfile": str(place / "user_key"), "port": str(port), "user": "root"}
        url = f"ssh://127.0.0.1{remote}"
        yield Remote(url, settings, lambda md5: cut_file(remote, md5))
    finally:
        process.terminate()
        process.wait()


@contextmanager
def s3(place: Path) -> Iterator[Remote]:
    """A bucket of moto's server."""
    for name in ("dvc_s3", "moto", "flask"):
        _needs(name)
    import boto3

    port = _free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        _wait_for(port)
        endpoint = f"http://127.0.0.1:{port}"
        keys = {"aws_access_key_id": "test", "aws_secret_access_key": "test"}
        client = boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1", **keys)
        client.create_bucket(Bucket="bucket")

        def cut(md5: str) -> None:
            name = {"Bucket": "bucket", "Key": f"folder/{object_path(md5)}"}
            content = client.get_object(**name)["Body"].read()
            client.put_object(**name, Body=content[:-100])

        settings = {
            "endpointurl": endpoint,
            "access_key_id": "test",
            "secret_access_key": "test",
            "region": "us-east-1",
        }
        yield Remote("s3://bucket/folder", settings, cut)
    finally:
        process.terminate()
        process.wait()


REMOTES = {"folder": folder, "ssh": ssh, "s3": s3}


def _needs(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"needs {package}: pip install -c constraints.txt -e '.[cluster]'")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_for(port: int) -> None:
    wait_until(lambda: _is_open(port), 30, lambda: f"nobody listens at port {port}")


def _is_open(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True
