"""A real S3 server on loopback, moto's, for tests that import `s3_server` as a fixture."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import boto3
import pytest

# What every part of the stack reads: s3fs and Composer and streaming through boto.
ENVIRONMENT = {
    'AWS_ACCESS_KEY_ID': 'test',
    'AWS_SECRET_ACCESS_KEY': 'test',
    'AWS_DEFAULT_REGION': 'us-east-1',
}
BUCKET = 'corpus'


@pytest.fixture(scope='module')
def s3_server() -> Iterator[str]:
    """A server with an empty bucket, to which the environment points; gives its address."""
    with serve() as (url, _):
        yield url


def reserve_port() -> socket.socket:
    """A free port of loopback that, until the socket is closed, nobody is given but who asks for it by number.

    It does not listen, so that who sets SO_REUSEADDR, as torch's store and HTTP servers do, can.
    """
    held = socket.socket()
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    held.bind(('127.0.0.1', 0))
    return held


@contextmanager
def serve() -> Iterator[tuple[str, subprocess.Popen]]:
    """Start a server with an empty bucket, point the environment at it, and give its address and its process."""
    pytest.importorskip('moto', reason='moto[server] is not installed')
    held = reserve_port()
    port = held.getsockname()[1]
    url = f'http://127.0.0.1:{port}'
    environment = {**ENVIRONMENT, 'S3_ENDPOINT_URL': url}
    before = {name: os.environ.get(name) for name in environment}
    server = subprocess.Popen(
        [sys.executable, '-m', 'moto.server', '-H', '127.0.0.1', '-p', str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        os.environ.update(environment)
        _wait(port, server)
        boto3.client('s3', endpoint_url=url).create_bucket(Bucket=BUCKET)
        yield url, server
    finally:
        server.kill()
        server.wait()
        held.close()
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _wait(port: int, server: subprocess.Popen) -> None:
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline:
        assert server.poll() is None, 'the S3 server ended before it answered'
        try:
            socket.create_connection(('127.0.0.1', port), 1).close()
            return
        except OSError:
            time.sleep(0.1)
    raise TimeoutError('the S3 server did not answer within three minutes')
