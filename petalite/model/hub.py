"""A checkpoint's files on the Hugging Face hub, fetched as they are asked for: whole, or some ranges of them.

The first file fixes the commit, and every other file comes from that commit. Whole files go to the hub's own
cache; `huggingface_hub` fetches them, shows the progress, and is imported only here. Of weights, only the
ranges that are wanted come. Knows file names; knows nothing of what is in them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlsplit

from petalite.errors import InvalidCheckpoint
from petalite.model.ranges import PartialFile, Range, http_range

_FIRST = "config.json"
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Location:
    """Where the hub says that a file lies now."""

    url: str
    headers: Mapping[str, str]
    size: int | None


class HubFiles:
    """The files of `repo` (`owner/name`) at `revision` (a branch, tag or commit; None: its main branch)."""

    def __init__(self, repo: str, revision: str | None = None) -> None:
        self.name = repo
        self._revision = revision
        config = self.find(_FIRST)
        if config is None:
            raise InvalidCheckpoint(f"the hub's {repo} holds no {_FIRST}; it is no checkpoint")
        self.folder = config.parent
        # The cache lays files out as snapshots/COMMIT/NAME.
        self.version: str | None = self.folder.name
        self._revision = self.version

    def find(self, name: str) -> Path | None:
        """The file's path in the cache, downloaded if it is not there; None if the repository has none."""
        return self._asked(name, lambda: self._found(name))

    def _found(self, name: str) -> Path | None:
        from huggingface_hub import _CACHED_NO_EXIST, hf_hub_download, try_to_load_from_cache

        # What this commit is known not to hold needs no question, and may not have one when offline.
        if try_to_load_from_cache(self.name, name, revision=self._revision) is _CACHED_NO_EXIST:
            return None
        return Path(hf_hub_download(self.name, name, revision=self._revision))

    def part(self, name: str, ranges: Sequence[Range]) -> Path | None:
        """A file of the true length of which at least these bytes are there; None if the repository has none.

        It is the whole file where the cache has that, or where the hub does not tell its length.
        """
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.constants import HF_HUB_CACHE

        cached = try_to_load_from_cache(self.name, name, revision=self._revision)
        if isinstance(cached, str):
            return Path(cached)
        path = Path(HF_HUB_CACHE) / "petalite" / self.name.replace("/", "--") / str(self.version) / name
        size: int | None = path.stat().st_size if path.exists() else 0
        if not size:  # or it is just being made, or was when that was cut off
            location = self._asked(name, lambda: self._locate(name))
            if location is None:
                return None
            size = location.size
        if size is None:
            return self.find(name)
        partial = PartialFile(path, size)
        partial.ensure(ranges, lambda start, end: self._fetch(name, start, end))
        return partial.path

    def here(self, name: str, start: int, end: int) -> Path | None:
        """The file if the cache has all of it."""
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(self.name, name, revision=self._revision)
        return Path(cached) if isinstance(cached, str) else None

    def _locate(self, name: str) -> _Location:
        from huggingface_hub import get_hf_file_metadata, hf_hub_url
        from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

        url = hf_hub_url(self.name, name, revision=self._revision)
        found = get_hf_file_metadata(url)
        headers = build_hf_headers()
        if urlsplit(found.location).netloc != urlsplit(url).netloc:
            headers.pop("authorization", None)  # a token is for the hub, not for where it sends us
        return _Location(found.location, headers, found.size)

    def _fetch(self, name: str, start: int, end: int) -> Iterator[bytes]:
        # Asked for each time: a location is signed, and good for some minutes only.
        try:
            location = self._asked(name, lambda: self._locate(name))
        except InvalidCheckpoint as error:  # to be tried again, as a connection that ends is
            raise OSError(str(error)) from error
        if location is None:
            raise OSError(f"the hub no longer has {name} of {self.name}")
        return http_range(location.url, location.headers, start, end)

    def _asked(self, name: str, question: Callable[[], T]) -> T | None:
        """The hub's answer; None if it has no such file. Its many errors become one sentence."""
        from huggingface_hub.errors import (
            EntryNotFoundError,
            GatedRepoError,
            LocalEntryNotFoundError,
            RepositoryNotFoundError,
            RevisionNotFoundError,
        )

        where = f"{self.name} at {self._revision}" if self._revision else self.name
        try:
            return question()
        except LocalEntryNotFoundError as error:  # an EntryNotFoundError too, so it must come first
            raise InvalidCheckpoint(
                f"cannot reach the hub for {name} of {where}, and it is not in the cache; check the "
                f"connection or give a folder"
            ) from error
        except EntryNotFoundError:
            return None
        except GatedRepoError as error:
            raise InvalidCheckpoint(
                f"the hub wants you to accept the terms of {where} and log in first"
            ) from error
        except RevisionNotFoundError as error:
            raise InvalidCheckpoint(f"the hub knows no revision {self._revision!r} of {self.name}") from error
        except RepositoryNotFoundError as error:
            raise InvalidCheckpoint(
                f"there is no folder {self.name!r}, and no repository of that name on the hub you may read"
            ) from error
        except Exception as error:  # of the HTTP library beneath, which is not always the same; bad names
            raise InvalidCheckpoint(
                f"cannot fetch {name} of {where} from the hub: {_first_line(error)}"
            ) from error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
