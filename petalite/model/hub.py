"""A checkpoint's files on the Hugging Face hub, fetched one by one as they are asked for, into its own cache.

The first file fixes the commit, and every other file comes from that commit. `huggingface_hub` does the
work, shows the progress, and is imported only here. Knows file names; knows nothing of what is in them.
"""

from __future__ import annotations

from pathlib import Path

from petalite.errors import InvalidCheckpoint

_FIRST = "config.json"


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
        from huggingface_hub import _CACHED_NO_EXIST, hf_hub_download, try_to_load_from_cache
        from huggingface_hub.errors import (
            EntryNotFoundError,
            GatedRepoError,
            HfHubHTTPError,
            LocalEntryNotFoundError,
            OfflineModeIsEnabled,
            RepositoryNotFoundError,
            RevisionNotFoundError,
        )

        where = f"{self.name} at {self._revision}" if self._revision else self.name
        # What this commit is known not to hold needs no question, and may not have one when offline.
        if try_to_load_from_cache(self.name, name, revision=self._revision) is _CACHED_NO_EXIST:
            return None
        try:
            return Path(hf_hub_download(self.name, name, revision=self._revision))
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
        except (HfHubHTTPError, OfflineModeIsEnabled, OSError) as error:
            raise InvalidCheckpoint(
                f"cannot fetch {name} of {where} from the hub: {_first_line(error)}"
            ) from error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
