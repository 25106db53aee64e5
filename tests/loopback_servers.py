"""A server on this machine that stands in for object storage."""

import logging
import os
from contextlib import contextmanager
from pathlib import Path


class Bucket:
    """A bucket of moto's server, filled over the same interface that is read from."""

    def __init__(self, url: str, name: str) -> None:
        import boto3

        self.url, self.name = url, name
        key = {"aws_access_key_id": "test", "aws_secret_access_key": "test", "region_name": "us-east-1"}
        self.client = boto3.client("s3", endpoint_url=url, **key)
        self.client.create_bucket(Bucket=name)

    def put(self, key: str, content: bytes, *, public: bool = True) -> None:
        grant = {"ACL": "public-read"} if public else {}
        self.client.put_object(Bucket=self.name, Key=key, Body=content, **grant)

    def delete(self, key: str) -> None:
        self.client.delete_object(Bucket=self.name, Key=key)

    def fill(self, folder: Path, prefix: str) -> str:
        """Copy a folder there and return its address."""
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                self.put(f"{prefix}/{path.relative_to(folder).as_posix()}", path.read_bytes())
        return f"s3://{self.name}/{prefix}"


@contextmanager
def serve_s3():
    """Yield the address of a server of S3."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    before = os.environ.copy()
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    os.environ.clear()
    os.environ.update(before)  # it sets credentials
    try:
        yield "http://{}:{}".format(*server.get_host_and_port())
    finally:
        server.stop()
