"""pip and archives: no network, small carriers made here."""

import errno
import hashlib
import io
import re
import subprocess
import tarfile

import pytest

from limbeck import assets

NAME = "limbeck_toy-1.0"


def tar(files):
    """The bytes of a .tar.gz of {name: content}."""
    whole = io.BytesIO()
    with tarfile.open(fileobj=whole, mode="w:gz") as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return whole.getvalue()


@pytest.fixture
def sdist(tmp_path, monkeypatch):
    """An sdist whose setup.py leaves a file `ran` behind, the only carrier that pip can see."""
    folder = tmp_path / "index"
    folder.mkdir()
    setup = (
        f"open({str(tmp_path / 'ran')!r}, 'w')\nfrom setuptools import setup\nsetup(name='limbeck_toy', version='1.0')"
    )
    inner = tar({"deep/words.txt": b"nested"})
    files = {"setup.py": setup.encode(), "plain.txt": b"plain", "more/inner.tar.gz": inner}
    (folder / f"{NAME}.tar.gz").write_bytes(tar({f"{NAME}/{name}": content for name, content in files.items()}))
    for variable in ("PIP_EXTRA_INDEX_URL", "PIP_CONSTRAINT"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder / f"{NAME}.tar.gz"


@pytest.mark.parametrize(
    ("inside", "content"), [("plain.txt", b"plain"), ("more/inner.tar.gz!deep/words.txt", b"nested")]
)
def test_a_file_of_an_sdist_is_read_also_from_a_tar_in_it(sdist, inside, content):
    with assets.opened(sdist, f"{NAME}/{inside}") as source:
        assert source.read() == content


@pytest.mark.parametrize("inside", ["absent.txt", "more/inner.tar.gz!absent.txt"])
def test_a_file_that_is_not_in_the_carrier_is_a_key_error(sdist, inside):
    with pytest.raises(KeyError, match=r"absent\.txt"), assets.opened(sdist, f"{NAME}/{inside}"):
        pass


@pytest.mark.slow
def test_nothing_of_an_sdist_runs_before_its_sum_is_right(sdist, tmp_path):
    (tmp_path / "to").mkdir()
    with pytest.raises(RuntimeError, match=r"could not download limbeck_toy==1.0.*0{64}"):
        assets.download("limbeck_toy==1.0", kind="sdist", sha256="0" * 64, folder=tmp_path / "to")
    assert not (tmp_path / "ran").exists()
    assert not list((tmp_path / "to").glob("*.tar.gz"))


@pytest.mark.slow
def test_an_sdist_with_the_right_sum_is_brought(sdist, tmp_path, monkeypatch):
    pytest.importorskip("setuptools")
    monkeypatch.setenv("PIP_NO_BUILD_ISOLATION", "0")  # pip reads 0 as "no isolation"; there is no index to build from
    (tmp_path / "to").mkdir()
    right = hashlib.sha256(sdist.read_bytes()).hexdigest()
    assets.download("limbeck_toy==1.0", kind="sdist", sha256=right, folder=tmp_path / "to")
    assert (tmp_path / "to" / sdist.name).read_bytes() == sdist.read_bytes()
    assert (tmp_path / "ran").exists()


@pytest.mark.slow
def test_a_kind_brings_no_carrier_of_the_other_kind(sdist, tmp_path):
    with pytest.raises(RuntimeError, match=r"network.*No matching distribution") as caught:
        assets.download("limbeck_toy==1.0", kind="wheel", sha256="0" * 64, folder=tmp_path)
    assert "\n" not in str(caught.value)


def test_a_full_disk_under_pip_is_an_os_error(tmp_path, monkeypatch):
    failed = subprocess.CompletedProcess([], 1, "", "ERROR: Could not install: [Errno 28] No space left on device\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(OSError, match=re.escape("No space left")) as caught:
        assets.download("toy==1.0", kind="wheel", sha256="0" * 64, folder=tmp_path)
    assert caught.value.errno == errno.ENOSPC
