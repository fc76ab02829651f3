"""A real S3 server on loopback, moto's, for tests that import `s3_server` as a fixture."""

import http.client
import http.server
import io
import os
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

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


class Faulty:
    """Stands before the real server, and deals with the first answers to some requests as `fault` says."""

    def __init__(self, url: str, fault: str, faults: int, what: str = 'objects'):
        host = urllib.parse.urlsplit(url)
        outer = self
        self.faults = faults

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = 'HTTP/1.1'

            def pass_on(self) -> None:
                sent = self.rfile.read(int(self.headers.get('Content-Length', 0)))
                concerned = {
                    'objects': self.command == 'GET' and 'Range' in self.headers,
                    'listings': 'list-type=2' in self.path,
                    'writes': self.command == 'PUT',
                    'all': True,
                }[what]
                if failing := concerned and outer.faults > 0:
                    outer.faults -= 1
                if failing and fault == 'reset':
                    self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0))
                    self.connection.close()
                    self.close_connection = True
                    self.wfile = io.BytesIO()  # pyright: ignore
                    return
                if failing and fault == '503':
                    self.send_response(503)
                    self.send_header('Content-Length', '0')
                    self.end_headers()
                    return
                connection = http.client.HTTPConnection(str(host.hostname), host.port)
                connection.request(self.command, self.path, sent, dict(self.headers))
                answer = connection.getresponse()
                body = answer.read()
                self.send_response(answer.status)
                for name, value in answer.getheaders():
                    if name.lower() not in ('connection', 'transfer-encoding', 'date', 'server', 'content-length'):
                        self.send_header(name, value)
                length = answer.getheader('Content-Length') if self.command == 'HEAD' else str(len(body))
                self.send_header('Content-Length', length or '0')
                self.end_headers()
                if failing:
                    self.wfile.write(body[: len(body) // 2])
                    if fault == 'timeout':
                        self.wfile.flush()
                        time.sleep(1.5)
                    self.close_connection = True
                elif self.command != 'HEAD':
                    self.wfile.write(body)

            do_GET = do_HEAD = do_PUT = do_POST = pass_on

            def log_message(self, *arguments: Any) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
        self.url = f'http://127.0.0.1:{self.server.server_port}'
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
