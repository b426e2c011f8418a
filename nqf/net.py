"""The one way to the network: http(s) alone, no redirect into the machine or its neighborhood, bounded answers."""

from __future__ import annotations

import http.client
import ipaddress
import os
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from typing import Any

AGENT = "nqf/0.1"
"""Shops and universities refuse urllib's own name."""
_CHUNK = 1 << 16
_ALLOW = "NQF_PRIVATE_REDIRECTS"


class RefusedError(ValueError):
    """An address or an answer that is refused; asking again gives no other."""


def open_url(url: str, *, timeout: float, headers: dict[str, str] | None = None) -> Any:
    """Opens an http(s) address and follows its redirects.

    A redirect to an address that is not public (loopback, private, link-local, ...) is refused, since a link of a
    catalogue could so read what only this machine can reach; `NQF_PRIVATE_REDIRECTS=allow` in the environment allows
    it. The first address is the user's own word and may be any.

    Args:
      url: The address.
      timeout: Longest wait for a connection or for further bytes, in seconds.
      headers: Further headers of the request.

    Returns:
      The response, to be closed.

    Raises:
      RefusedError: Another scheme, or a redirect that is refused.
      OSError: The connection failed, or the server answered with an error (`urllib.error.HTTPError`).
    """
    _check_scheme(url)
    request = urllib.request.Request(url, headers={"User-Agent": AGENT, **(headers or {})})
    try:
        return _OPENER.open(request, timeout=timeout)
    except http.client.HTTPException as error:
        raise ConnectionError(f"not an answer of a web server ({error!r:.200})") from error


def read_chunks(response: Any, *, limit: int, seconds: float | None = None) -> Iterator[bytes]:
    """Yields an answer's body, whether its length is known or not.

    Args:
      response: Of `open_url`.
      limit: Most bytes.
      seconds: Longest time for all of it.

    Raises:
      RefusedError: More bytes than `limit`, announced or sent.
      OSError: The connection broke off, or took too long.
    """
    length, size = response.headers.get("Content-Length"), 0
    end = None if seconds is None else time.monotonic() + seconds
    if length is not None and length.isdecimal() and int(length) > limit:
        raise RefusedError(f"larger than {limit} bytes")
    try:
        # One read of the socket at a time: a body that drips must not be waited for in one call.
        while chunk := response.read1(_CHUNK):
            size += len(chunk)
            if size > limit:
                raise RefusedError(f"larger than {limit} bytes")
            if end is not None and time.monotonic() > end:
                raise TimeoutError(f"not complete after {seconds:g} seconds")
            yield chunk
    except http.client.HTTPException as error:
        raise ConnectionError(f"broke off after {size} bytes") from error
    if length not in (None, str(size)):
        raise ConnectionError(f"broke off after {size} of {length} bytes")


def _check_scheme(url: str) -> None:
    scheme = urllib.parse.urlsplit(url).scheme.lower()
    if scheme not in ("http", "https"):
        raise RefusedError(f"'{scheme[:20]}:' is neither http nor https")


def _check_address(host: str) -> None:
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        public = host.rstrip(".").lower() != "localhost"
    else:
        public = (getattr(address, "ipv4_mapped", None) or address).is_global
    if not public and os.environ.get(_ALLOW) != "allow":
        raise RefusedError(f"redirected to {host}, which is not a public address; {_ALLOW}=allow allows it")


class _Redirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        _check_scheme(newurl)
        _check_address(urllib.parse.urlsplit(newurl).hostname or "")
        request = super().redirect_request(req, fp, code, msg, headers, newurl)
        if request is not None:
            request.is_redirect = True  # pyright: ignore[reportAttributeAccessIssue]
        return request


class _CheckedHTTP(http.client.HTTPConnection):
    def connect(self) -> None:
        super().connect()
        _check_peer(self)


class _CheckedHTTPS(http.client.HTTPSConnection):
    def connect(self) -> None:
        super().connect()
        _check_peer(self)


def _check_peer(connection: http.client.HTTPConnection) -> None:
    # Where the name led, not what a lookup before the connection said: the next lookup may say something else.
    try:
        _check_address(connection.sock.getpeername()[0])
    except RefusedError:
        connection.close()
        raise


def _is_checked(request: Any) -> bool:
    # Behind a proxy the peer is the proxy, and where names lead is its business.
    return getattr(request, "is_redirect", False) and not request.has_proxy()


class _Http(urllib.request.HTTPHandler):
    def http_open(self, req: Any) -> Any:
        return self.do_open(_CheckedHTTP if _is_checked(req) else http.client.HTTPConnection, req)


class _Https(urllib.request.HTTPSHandler):
    def https_open(self, req: Any) -> Any:
        return self.do_open(_CheckedHTTPS if _is_checked(req) else http.client.HTTPSConnection, req)


_OPENER = urllib.request.build_opener(_Redirects, _Http, _Https)
