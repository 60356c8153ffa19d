"""Wanted files of a data set on the Hugging Face hub: planned exactly, loaded, unpacked, checked.

Media lie there in zips of about 5 GB, some as single files. The list of a zip's members is read
first, by ranges. So no progress has to be saved: a file is done when it lies in its place with the
size that its zip names. Zips are loaded one after the other and compared with the hub's SHA-256;
the wanted members are unpacked and the zip is deleted, so the disk holds one zip at a time. A file
cut by a stop is continued (hf_hub_download of huggingface_hub 2 begins it anew, so http_get is
used). Mirrors (HF_ENDPOINT), proxies and logins are huggingface_hub's own.
"""

import fcntl
import hashlib
import io
import posixpath
import shutil
import stat
import time
import zipfile
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, constants, hf_hub_url
from huggingface_hub.errors import HTTPError
from huggingface_hub.file_download import http_get
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import (
    build_hf_headers, hf_raise_for_status, http_backoff, http_stream_backoff)


def url_of(repo: str, path: str) -> str:
    return hf_hub_url(repo, path, repo_type="dataset")


def headers_for(url: str) -> dict:
    """With the hub's login, where the hub is asked."""
    return build_hf_headers() if url.startswith(f"{constants.ENDPOINT}/") else {}


def size_of(path: Path) -> int:
    """Bytes of a file; -1 if there is none."""
    return path.stat().st_size if path.is_file() else -1


def part_of(path: Path) -> Path:
    """What a file is called until it is whole."""
    return path.with_name(path.name + ".part")


def fetch(url: str, path: Path, size: int | None = None, sha256: str | None = None,
          label: str | None = None) -> None:
    """Load a file; a part of one whose size is known is continued. OSError, and nothing is left,
    where its SHA-256 is not the expected one."""
    part = part_of(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if size is None or size_of(part) > size:
        part.unlink(missing_ok=True)
    with open(part, "ab+") as file:
        try:
            http_get(url, file, resume_size=file.tell(), headers=headers_for(url),
                     expected_size=size, displayed_filename=label or path.name)
        except (HTTPError, OSError):
            if size is None or not size_of(part):       # nothing that can be continued
                part.unlink()
            raise
        file.seek(0)
        found = hashlib.file_digest(file, "sha256").hexdigest() if sha256 else None
    if found != sha256:
        part.unlink()
        raise OSError(f"{url}: its SHA-256 is {found}, not {sha256}: deleted")
    part.rename(path)


class Remote(io.RawIOBase):
    """A file on the hub, read by ranges."""

    def __init__(self, url: str, size: int):
        self.url, self.size, self.at = url, size, 0

    def readable(self) -> bool:
        return True

    seekable = readable

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.at = offset + (0, self.at, self.size)[whence]
        return self.at

    def readinto(self, buffer) -> int:
        n = max(0, min(len(buffer), self.size - self.at))
        if n:
            response = http_backoff("GET", self.url, headers=self.headers(n))
            hf_raise_for_status(response)
            buffer[:n] = response.content
            self.at += n
        return n

    def headers(self, n: int) -> dict:
        return {"Range": f"bytes={self.at}-{self.at + n - 1}", **headers_for(self.url)}

    def check(self) -> None:
        """OSError if the hub refuses (zipfile would call that a bad zip), or would send the whole
        file for a part of it. Nothing is read here: http_stream_backoff cannot retry that."""
        with http_stream_backoff("GET", self.url, headers=self.headers(1)) as response:
            hf_raise_for_status(response)
            if response.status_code != 206:
                raise OSError(f"{self.url}: this server does not send parts of files")


def members(repo: str, file: RepoFile) -> list[zipfile.ZipInfo]:
    """What a zip on the hub holds; OSError if a member would leave the zip's folder."""
    remote = Remote(url_of(repo, file.path), file.size)
    remote.check()
    try:
        with zipfile.ZipFile(remote) as archive:
            infos = [info for info in archive.infolist() if not info.is_dir()]
    except zipfile.BadZipFile as error:
        raise OSError(f"{repo}: {file.path}: {error}") from None
    for info in infos:
        parts = info.filename.replace("\\", "/").split("/")
        if ".." in parts or not parts[0] or stat.S_ISLNK(info.external_attr >> 16):
            raise OSError(f"{repo}: {file.path}: its member {info.filename!r} leaves the folder: "
                          "the zip is refused")
    return infos


@dataclass
class Source:
    """A file on the hub and what is wanted of it: {place: member of the zip}, or {place: None} for
    a file that is no zip. Places are paths below the folder that all is loaded into."""
    file: RepoFile
    items: dict[str, zipfile.ZipInfo | None]

    def missing(self, folder: Path) -> dict[str, int]:
        """{place: bytes} of what is not there, or has another size."""
        sizes = {place: info.file_size if info else self.file.size
                 for place, info in self.items.items()}
        return {place: n for place, n in sizes.items() if size_of(folder / place) != n}

    @property
    def is_zip(self) -> bool:
        return None not in self.items.values()

    def path(self, folder: Path) -> Path:
        return folder / (self.file.path if self.is_zip else min(self.items))


def sources_of(repo: str, root: str, wanted: set[str]) -> list[Source]:
    """The files of a data set that hold wanted places; `root` is the place of its own root. Below
    one that is not "" a file's name is enough where a single wanted place has it: clips of a
    benchmark lie on the hub in folders that its list does not know."""
    names = Counter(map(posixpath.basename, wanted if root else ()))
    by_name = {posixpath.basename(place): place for place in wanted}

    def place(*path: str) -> str | None:
        exact, name = posixpath.normpath(posixpath.join(root, *path)), posixpath.basename(path[-1])
        return exact if exact in wanted else by_name[name] if names[name] == 1 else None

    tops = {place.split("/")[0] for place in wanted}
    files = [file for file in HfApi().list_repo_tree(repo, recursive=True, repo_type="dataset")
             if isinstance(file, RepoFile) and (root or file.path.split("/")[0] in tops)]
    zips = [file for file in files if file.path.endswith(".zip")]
    sources, taken = [Source(file, {place(file.path): None}) for file in files], {None}
    with ThreadPoolExecutor(8) as pool:
        for file, infos in zip(zips, pool.map(lambda file: members(repo, file), zips)):
            inside = posixpath.dirname(file.path)
            sources.append(Source(file, {place(inside, info.filename): info for info in infos}))
    for source in sources:                          # what several hold comes from the first
        source.items = {x: info for x, info in source.items.items() if x not in taken}
        taken.update(source.items)
    return [source for source in sources if source.items]


def unpack(source: Source, folder: Path) -> None:
    """A zip's wanted members that are missing. One that cannot be read, or does not agree with its
    CRC, ends this, and the zip goes."""
    path = source.path(folder)
    try:
        with zipfile.ZipFile(path) as archive:
            for place in source.missing(folder):
                part = part_of(folder / place)
                part.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(source.items[place]) as member, open(part, "wb") as file:
                    shutil.copyfileobj(member, file, 1 << 20)
                part.rename(folder / place)
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        path.unlink()
        raise OSError(f"{path}: {error}: deleted") from None


def load(repo: str, root: str, wanted: set[str], folder: Path, keep_zips: bool = False,
         dry_run: bool = False) -> None:
    """Say what the wanted files of a data set take; load and unpack what is missing. SystemExit
    before anything is loaded if the disk has too little room, or another process loads it here."""
    if not dry_run:
        lock = open(folder / f".{posixpath.basename(repo)}.lock", "w")      # until this returns
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SystemExit(f"error: {folder}: another process loads {repo} into it") from None
    print(f"{repo}: reading what its files hold ...", flush=True)
    sources = sources_of(repo, root, wanted)
    absent = wanted.difference(*(source.items for source in sources))
    todo = [source for source in sources if source.missing(folder)]
    media = sum(sum(source.missing(folder).values()) for source in todo)
    loads = []                                      # bytes that are still to come
    for source in todo:
        path, size = source.path(folder), source.file.size
        loads.append(0 if size_of(path) == size else size - max(0, size_of(part_of(path))))
    zips = [n for source, n in zip(todo, loads) if source.is_zip]
    needed = media + (sum(zips) if keep_zips else max(zips, default=0))
    free = shutil.disk_usage(folder).free
    print(f"{repo}: {len(wanted)} files are named, {len(absent)} of them are not on the hub; "
          f"{sum(loads) / 1e9:.2f} GB to load in {len(todo)} files; the disk needs "
          f"{needed / 1e9:.2f} GB and has {free / 1e9:.2f} GB", flush=True)
    if dry_run:
        return
    if needed > free:
        raise SystemExit(f"error: {folder}: the disk has too little room; --only takes a part")
    begun, done = time.time(), 0
    for i, (source, n) in enumerate(zip(todo, loads), 1):
        path, file = source.path(folder), source.file
        if size_of(path) != file.size:
            fetch(url_of(repo, file.path), path, file.size, file.lfs and file.lfs.sha256,
                  f"{i}/{len(todo)} {path.name}")
        if source.is_zip:
            unpack(source, folder)
            if not keep_zips:
                path.unlink()
        done += n
        left = (sum(loads) - done) * (time.time() - begun) / max(1, done) / 3600
        print(f"{path}: {len(source.items)} files; {done / 1e9:.2f} of {sum(loads) / 1e9:.2f} GB, "
              f"{left:.1f} hours to go at this rate", flush=True)
