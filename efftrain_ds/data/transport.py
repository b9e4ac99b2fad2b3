"""Fetching one file of a remote folder to a local path: fsspec for URLs, a shell command for ``pipe:``.

Nothing is retried or trusted here; see `cache`.
"""

from __future__ import annotations

import re
import select
import shlex
import signal
import subprocess
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from os import killpg, read
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urlsplit

from ..core.errors import ShardError
from ..core.redact import HIDDEN, PIPE, redacted

PROTOCOLS = {"file": None, "http": None, "https": None, "s3": "s3", "gs": "gs", "gcs": "gs"}
"""Protocols of a remote folder and the extra of this package that each one needs."""

_CHUNK = 1 << 20
_BETWEEN = re.compile(r"""[\s'"|;&()<>=]+|\{name\}""")
_SAFE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+=-]*")


class Stopped(Exception):
    """The transfer was given up because the program ends."""


def is_remote(where: str) -> bool:
    """True for URLs and for ``pipe:`` commands, false for paths and bundled names."""
    return where.startswith(PIPE) or "://" in where


@dataclass(frozen=True)
class RemoteFolder:
    """A folder that is read through a URL or a command; picklable, opens nothing before the first transfer.

    Args:
        url: ``s3://bucket/folder``, ``gs://...``, ``http(s)://...``, ``file:///...``, or ``pipe:COMMAND`` where
            ``{name}`` stands for the file and the content comes on standard output.
        stall_s: seconds without a byte after which a transfer fails.
    """

    url: str
    stall_s: float = 60.0

    def check(self, allow_pipe: bool) -> None:
        """Refuse what cannot be read.

        Raises:
            ShardError: unknown protocol, a ``pipe:`` without leave or without ``{name}``.
        """
        if self.url.startswith(PIPE):
            if not allow_pipe:
                raise ShardError(
                    f"{self.shown()} runs a shell command on every node; set efftrain.data.allow_pipe to true if you "
                    "trust it"
                )
            if "{name}" not in self.url:
                raise ShardError(f"{self.shown()}: the command needs {{name}} where the name of the file stands")
            return
        protocol = self.url.partition("://")[0]
        if protocol not in PROTOCOLS:
            raise ShardError(f"{self.shown()}: allowed are {', '.join(f'{p}://' for p in PROTOCOLS)} and {PIPE}COMMAND")

    def join(self, name: str) -> str:
        """URL (or command) of one file of the folder.

        Raises:
            ShardError: a name that could leave the folder or mean something to a shell.
        """
        if not _SAFE_NAME.fullmatch(name):
            raise ShardError(
                f"{self.shown()}: file name {name!r}; allowed are letters, digits and ._+=- without folders"
            )
        if self.url.startswith(PIPE):
            return self.url.replace("{name}", shlex.quote(name))
        base, mark, query = self.url.partition("?")
        return f"{base.rstrip('/')}/{name}{mark}{query}"

    def shown(self, name: str | None = None) -> str:
        """URL for messages: without user, password and query, which may be secrets, as all of a command may be."""
        url = self.url if name is None else self.join(name)
        if url.startswith(PIPE):
            return HIDDEN if name is None else f"{HIDDEN} ({name})"
        return redacted(url)

    def identity(self, name: str | None = None) -> str:
        """What tells folder or file from others in the cache: a new token is no new file. Not for messages.

        Files that differ in the query alone have one identity; the cache's names have the hash of the content, too.
        """
        if self.url.startswith(PIPE):
            return self.url if name is None else self.join(name)
        return self.shown(name)

    def clean(self, text: str) -> str:
        """A message of another package or command without the secrets of this URL or command, however quoted."""
        text = redacted(text)
        for secret in sorted(self._secrets(), key=len, reverse=True):
            text = text.replace(secret, "...")
        return text

    def _secrets(self) -> set[str]:
        """What must not be shown, in the forms in which others may write it; shorter ones are parts of any text."""
        if self.url.startswith(PIPE):
            words = {word for word in _BETWEEN.split(self.url[len(PIPE) :]) if "://" not in word}
            return {word for word in words if len(word) > 7 or (len(word) > 4 and not word.islower())}
        parts = urlsplit(self.url)
        found = {parts.query, parts.fragment, parts.netloc.rpartition("@")[0]}
        found |= {value for part in found for value in re.split("[&;=:]", part)}
        found |= {unquote(secret) for secret in found}
        found |= {quote(secret, safe=safe) for secret in found for safe in ("", "/", "/:@!$'()*,;")}
        return {secret for secret in found if len(secret) > 5}

    def fetch(self, name: str, target: Path, stop: threading.Event | None = None) -> None:
        """Write one file to a local path.

        Raises:
            ShardError: the protocol's package is not installed.
            Stopped: `stop` was set.
            Exception: whatever the transfer failed with.
        """
        if self.url.startswith(PIPE):
            _run_pipe(self.join(name)[len(PIPE) :], target, self.stall_s, stop)
            return
        system = self._system()
        system.get_file(self.join(name), str(target), callback=_callback(stop))

    def sizes(self) -> dict[str, int] | None:
        """Bytes of each file by name, from one listing; None where the protocol cannot list."""
        if self.url.startswith((PIPE, "http:", "https:")):
            return None
        entries = self._system().ls(self.url, detail=True)
        return {str(e["name"]).rsplit("/", 1)[-1]: int(e["size"]) for e in entries if e["type"] == "file"}

    def _system(self) -> Any:
        import fsspec

        protocol = self.url.partition("://")[0]
        try:
            return fsspec.filesystem(protocol, **_options(protocol, self.stall_s))
        except ImportError as error:
            extra = PROTOCOLS.get(protocol)
            how = f"pip install 'efftrain-ds[{extra}]'" if extra else "pip install 'fsspec[http]'"
            raise ShardError(f"{protocol}:// needs: {how} ({error})") from error


def _options(protocol: str, stall_s: float) -> dict[str, Any]:
    """Time limits by protocol; everything else (keys, end points) is the environment's, see fsspec and the SDKs."""
    if protocol in ("http", "https"):
        import aiohttp

        # fsspec's own limit is on the whole transfer, which a large shard on a slow line would exceed
        limits = aiohttp.ClientTimeout(total=None, sock_connect=stall_s, sock_read=stall_s)
        return {"client_kwargs": {"timeout": limits}, "headers": {"Accept-Encoding": "identity"}}
    if protocol == "s3":
        limits = {"connect_timeout": stall_s, "read_timeout": stall_s, "retries": {"max_attempts": 1}}
        return {"config_kwargs": limits, "use_listings_cache": False}
    return {}


def _callback(stop: threading.Event | None) -> Any:
    from fsspec.callbacks import Callback

    class Watch(Callback):
        def relative_update(self, inc: int = 1) -> None:
            if stop is not None and stop.is_set():
                raise Stopped

    return Watch()


def _run_pipe(command: str, target: Path, stall_s: float, stop: threading.Event | None) -> None:
    """Standard output of a shell command into a file; its exit status must be 0."""
    with (
        target.open("wb") as file,
        target.with_suffix(".stderr").open("w+b") as errors,
        subprocess.Popen(
            command, shell=True, stdout=subprocess.PIPE, stderr=errors, stdin=subprocess.DEVNULL, start_new_session=True
        ) as process,
    ):
        target.with_suffix(".stderr").unlink()
        assert process.stdout is not None
        try:
            _copy(process.stdout.fileno(), file.write, stall_s, stop)
            status = process.wait(timeout=stall_s)
        except BaseException:
            with suppress(ProcessLookupError):
                killpg(process.pid, signal.SIGKILL)  # the command and whatever it started
            raise
        if status != 0:
            errors.seek(0)
            last = errors.read().decode(errors="replace").strip().splitlines()[-1:]
            raise OSError(f"the command ended with status {status}" + "".join(f": {line}" for line in last))


def _copy(source: int, write: Callable[[bytes], Any], stall_s: float, stop: threading.Event | None) -> None:
    waited = 0.0
    while waited < stall_s:
        if stop is not None and stop.is_set():
            raise Stopped
        pause = min(0.2, stall_s)
        if not select.select([source], [], [], pause)[0]:
            waited += pause
            continue
        waited = 0.0
        chunk = read(source, _CHUNK)
        if not chunk:
            return
        write(chunk)
    raise TimeoutError(f"no byte in {stall_s:g} s")
