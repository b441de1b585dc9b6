"""What kills, full disks, second runs and wrong clocks cost: `python tests/torture.py`, or `… short` for the tests.

Everything goes on in a temporary copy of the tree at smoke size. A stage is killed (its process group, by SIGKILL) at
random moments: of the clock, or just before it opens, makes, renames or deletes a file of its own. Then it goes on.
What it wrote must equal an unbroken run's to the bit, and nothing else may be left: no file, no process, no lock.
The kernel that a notebook runs in is in a session of its own: it must see by itself that it is an orphan.
"""

import collections
import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import tree
from limbeck import assets, paths, records
from limbeck.experiments import ledger
from limbeck.workflow import notebooks, probe

TOKEN = "LIMBECK_TORTURE"  # the folder of this run, in the environment of every process that it starts
FILE_EVENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"}
NOTEBOOKS = paths.NOTEBOOKS / "sinkd"
TRAIN = {"experiment": "fig_gradient_shift", "profile": "smoke"}
PATIENCE = 15  # seconds that an orphan has to see that it is one
CODE = paths.ROOT / "src/limbeck/experiments/sinkd/gradient_shift.py"


@dataclasses.dataclass(frozen=True)
class Kind:
    """A stage, what goes before it, what it writes, and whether its moments are file events or the clock's."""

    name: str
    run: Callable[[], object]
    before: Callable[[], object]
    written: tuple[str, ...]
    by_event: bool = False


def train(experiment: str = "fig_toy_divergences") -> None:
    ledger.run("sinkd", experiment, "smoke")


def clean() -> None:
    """As a clone is: nothing run, nothing trained."""
    for folder in (paths.RESULTS / "smoke", *(paths.DATA / name for name in ("checkpoints", "resume", "executed"))):
        shutil.rmtree(folder, ignore_errors=True)


def trained() -> None:
    clean()
    train("fig_gradient_shift")


def fetch() -> None:
    """pip brings a wheel of our own from a folder: the real fetch, without a network."""
    with zipfile.ZipFile(scratch() / "torture_asset-1.0-py3-none-any.whl", "w") as wheel:
        head = {"METADATA": "Metadata-Version: 2.1\nName: torture-asset\nVersion: 1.0\n", "RECORD": ""}
        head["WHEEL"] = "Wheel-Version: 1.0\nGenerator: t\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        files = {f"torture_asset-1.0.dist-info/{name}": text.encode() for name, text in head.items()}
        content = {f"part{part}": bytes([part]) * 500_000 for part in range(8)}
        for name, data in (files | content).items():
            wheel.writestr(zipfile.ZipInfo(name), data)
    carrier = Path(wheel.filename)
    members = {n: assets.Member(n, len(d), hashlib.sha256(d).hexdigest()) for n, d in content.items()}
    checksum = hashlib.sha256(carrier.read_bytes()).hexdigest()
    asset = assets.Asset(
        "torture", "torture-asset==1.0", carrier.name, carrier.stat().st_size, checksum, "wheel", "", "", members
    )
    assets.manifest = lambda: {"torture": asset}
    os.environ |= {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(carrier.parent)}
    assets.fetch("torture")


def no_asset() -> None:
    shutil.rmtree(paths.DATA / "raw", ignore_errors=True)


def command(*words: str) -> Callable[[], None]:
    return lambda: os.execvp(words[0], words)


def git(*words: str) -> str:
    identity = ["-c", "user.name=t", "-c", "user.email=t@t"]
    return subprocess.run(["git", *identity, *words], check=True, capture_output=True, text=True).stdout


def repro_before() -> None:
    clean()
    git("checkout", "--quiet", "HEAD", "--", "dvc.lock")


def unsealed() -> None:
    """Records of a commit, and code with another digest and the same numbers after it."""
    clean()
    if "del _workspace" not in CODE.read_text():
        sealed = ledger.Ledger("sinkd", "fig_gradient_shift", "default")
        hashes = {records.cell_key(cell.coordinates): sealed.hash(cell) for cell in sealed.cells}
        records.write(sealed.file, [run | {"hash": hashes[key]} for key, run in sealed.measured().items()])
        git("add", "-A")
        git("commit", "--quiet", "--allow-empty", "-m", "records")
        CODE.write_text(CODE.read_text().replace("    grid = section", "    del _workspace\n    grid = section", 1))
        git("commit", "--quiet", "-am", "code")
    git("checkout", "--quiet", "HEAD", "--", "results")


SMOKE = ("results/smoke/**/*", "data/checkpoints/**/*")
KINDS = {
    kind.name: kind
    for kind in (
        Kind("training", train, clean, SMOKE),
        Kind("recording", train, clean, SMOKE, by_event=True),
        Kind("fetching", fetch, no_asset, ("data/raw/**/*",)),
        Kind("fetching by files", fetch, no_asset, ("data/raw/**/*",), by_event=True),
        Kind("a notebook that trains", lambda: notebooks.run(NOTEBOOKS / "train.ipynb", TRAIN), clean, SMOKE),
        Kind(
            "drawing",
            lambda: notebooks.run(NOTEBOOKS / "fig_gradient_shift.ipynb", {"profile": "smoke"}),
            trained,
            SMOKE,
        ),
        Kind("dvc repro", command("dvc", "repro", "sinkd-fig_gradient_shift"), repro_before, (*SMOKE, "dvc.lock")),
        Kind(  # last: it changes the copy's code
            "resealing",
            command(sys.executable, "-m", "limbeck.workflow.reseal", "sinkd/fig_gradient_shift"),
            unsealed,
            ("results/default/**/*",),
        ),
    )
}
SHORT = ("training", "recording", "fetching", "fetching by files")


def scratch() -> Path:
    return Path(os.environ[TOKEN])


def start(run: Callable[[], object], hook: Callable[[str, tuple], None] | None = None) -> int:
    """A child in a process group of its own; `hook` hears of its file events."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        os.setsid()
        with (scratch() / "log").open("a") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        if hook:
            sys.addaudithook(hook)
        run()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def ended(child: int) -> bool:
    return os.waitpid(child, 0)[1] == 0


def own_events(act: Callable[[int], None]) -> Callable[[str, tuple], None]:
    """A hook that counts the file events under results/ and data/ that change something, and acts before each."""
    count = 0

    def hook(event: str, values: tuple) -> None:
        nonlocal count
        if event not in FILE_EVENTS or not isinstance(values[0], str | Path):
            return
        reads = event == "open" and not values[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if not reads and str(values[0]).startswith((str(paths.RESULTS), str(paths.DATA))):
            count += 1
            act(count)

    return hook


def content(path: Path) -> object:
    """What must be equal of a file: of provenance not the seconds, of tensors their bits."""
    if "provenance" in path.parts:
        told = json.loads(path.read_text())
        return {name: value for name, value in told.items() if name not in ("seconds", "modified", "commit")}
    return probe.content(path)


def snapshot(kind: Kind) -> dict[str, object]:
    found = {path for pattern in kind.written for path in paths.ROOT.glob(pattern) if path.is_file()}
    return {str(path.relative_to(paths.ROOT)): content(path) for path in sorted(found)}


def listing() -> set[str]:
    """Every file that a stage could leave anywhere, but caches of bytecode and of DVC."""
    places = [paths.RESULTS, paths.DATA, paths.ROOT / ".dvc", scratch() / "tmp", scratch() / "runtime"]
    files = {path for place in places for path in place.rglob("*") if "site_cache_dir" not in path.parts}
    loose = {path for path in paths.ROOT.iterdir() if path.name != "__pycache__"}
    return {str(path) for path in files | loose}


def orphans() -> list[int]:
    """The processes that this one or a descendant started and that still run."""
    found = []
    for folder in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            told = folder.name.isdigit() and (folder / "environ").read_bytes()
            if told and f"{TOKEN}={scratch()}".encode() in told.split(b"\0"):
                found.append(int(folder.name))
    return [process for process in found if process != os.getpid()]


def held_locks() -> list[str]:
    """The locks that somebody holds: ours by flock, and DVC's entries of readers and writers that live.

    DVC keeps an entry of a dead one until it would block.
    """
    held = []
    for path in [*paths.DATA.rglob("*.lock"), *(paths.ROOT / ".dvc" / "tmp").glob("lock")]:
        with path.open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                held.append(str(path))
    rwlock = paths.ROOT / ".dvc" / "tmp" / "rwlock"
    told = json.loads(rwlock.read_text() or "{}") if rwlock.is_file() else {}
    return held + [f"{rwlock}: {pid}" for pid in re.findall(r'"pid": (\d+)', json.dumps(told)) if alive(int(pid))]


def alive(process: int) -> bool:
    return Path(f"/proc/{process}").exists()


def half_written() -> list[str]:
    """Files that are not whole. What papermill keeps of a run that goes on (data/executed) is begun anew each time."""
    broken = []
    for path in [path for place in (paths.RESULTS, paths.DATA) for path in place.rglob("*") if path.is_file()]:
        parts = path.relative_to(paths.ROOT).parts
        if "bench" in parts or any(part.startswith(".") for part in parts):
            continue  # temporary, or of another form: what goes on deletes it, which `listing` sees
        try:
            if path.suffix == ".jsonl" and "results" in path.parts:
                records.read_by_cell(path)
            elif path.suffix in (".json", ".ipynb") and "executed" not in path.parts[:-3]:
                json.loads(path.read_text())
            elif path.suffix == ".safetensors":
                probe.content(path)
            elif path.suffix == ".svg" and not path.read_text().endswith("</svg>\n"):
                raise ValueError("cut")
        except Exception as error:
            broken.append(f"{path.relative_to(paths.ROOT)}: {error}")
    return broken


class Campaign:
    """An unbroken run of one kind, to which broken ones are compared; what was tried and what was lost."""

    def __init__(self, kind: Kind, faults: list[tuple[str, str]]) -> None:
        self.kind, self.faults, self.events, self.trial = kind, faults, 0, "killed"
        kind.before()
        begun, reader, writer = time.monotonic(), *os.pipe()
        child = start(kind.run, own_events(lambda _: os.write(writer, b".")) if kind.by_event else None)
        os.close(writer)
        while kind.by_event and (read := os.read(reader, 65536)):
            self.events += len(read)
        os.close(reader)
        if not ended(child):
            raise RuntimeError(f"{kind.name}: the unbroken run failed; {(scratch() / 'log').read_text()[-3000:]}")
        self.seconds = time.monotonic() - begun
        self.right, self.files = snapshot(kind), listing()

    def fault(self, what: str) -> None:
        self.faults.append((self.kind.name, self.trial))
        print(f"FAULT {self.kind.name}, {what}", flush=True)

    def go_on(self, moment: str) -> None:
        """Run to the end, and compare everything."""
        print(f"{self.kind.name}, {moment}", flush=True)
        for path in half_written():
            self.fault(f"{moment}: half-written: {path}")
        (scratch() / "log").write_text("")
        if not ended(start(self.kind.run)):
            self.fault(f"{moment}: does not go on: {(scratch() / 'log').read_text()[-1500:]}")
        self.compare(moment)

    def compare(self, moment: str) -> None:
        now, files = snapshot(self.kind), listing()
        for name in sorted(now.keys() | self.right.keys()):
            if now.get(name) != self.right.get(name):
                self.fault(f"{moment}: {name} is not the unbroken run's")
        for path in sorted(files ^ self.files):
            self.fault(f"{moment}: {path} is {'left' if path in files else 'gone'}")
        for lock in held_locks():
            self.fault(f"{moment}: held: {lock}")
        if self.kind.name == "resealing" and len(git("worktree", "list").splitlines()) > 1:
            self.fault(f"{moment}: a worktree is left")

    def kill(self, moments: int) -> None:
        source = random.Random(self.kind.name)
        for _ in range(moments):
            self.kind.before()
            if self.kind.by_event:
                moment = source.randint(1, self.events)
                hook = own_events(lambda n, moment=moment: n == moment and os.killpg(0, signal.SIGKILL))
                child = start(self.kind.run, hook)
            else:
                moment = source.random() * self.seconds
                child, hook = start(self.kind.run), None
                time.sleep(moment)
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child, signal.SIGKILL)
            ended(child)
            until = time.monotonic() + PATIENCE
            while (left := orphans()) and time.monotonic() < until:
                time.sleep(0.2)
            for process in left:
                self.fault(f"at {moment}: orphan {Path(f'/proc/{process}/cmdline').read_bytes()!r}")
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            self.go_on(f"killed at {moment:.4g} of {self.events or self.seconds:.4g}")

    def refuse(self, moments: int, number: int) -> None:
        """Each file event from a random one on fails as on a full or a read-only disk; then there is room again."""
        source = random.Random(f"{self.kind.name} {number}")
        for _ in range(moments):
            self.kind.before()
            moment = source.randint(1, self.events)

            def fail(count: int, moment: int = moment) -> None:
                if count >= moment:
                    raise OSError(number, os.strerror(number))

            (scratch() / "log").write_text("")
            if ended(start(self.kind.run, own_events(fail))):
                self.fault(f"errno {number} at {moment}: no error")
            if os.strerror(number) not in (scratch() / "log").read_text():
                self.fault(f"errno {number} at {moment}: not named: {(scratch() / 'log').read_text()[-800:]}")
            self.go_on(f"errno {number} at {moment} of {self.events}")

    def twice(self, times: int) -> None:
        """Two runs at once: both end, and the results are one's."""
        source = random.Random(self.kind.name)
        for _ in range(times):
            self.kind.before()
            (scratch() / "log").write_text("")
            first, wait = start(self.kind.run), source.random() * self.seconds / 2
            time.sleep(wait)
            if not all([ended(start(self.kind.run)), ended(first)]):
                self.fault(f"twice, {wait:.2f} s apart: {(scratch() / 'log').read_text()[-1500:]}")
            self.compare(f"twice, {wait:.2f} s apart")

    def clock(self, times: int) -> None:
        """Killed, and gone on with when every file is of tomorrow and the clock runs backwards."""
        source = random.Random(self.kind.name)
        for _ in range(times):
            self.kind.before()
            child = start(self.kind.run)
            time.sleep(source.random() * self.seconds)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child, signal.SIGKILL)
            ended(child)
            tomorrow = time.time() + 86400
            for path in [*paths.RESULTS.rglob("*"), *paths.DATA.rglob("*")]:
                os.utime(path, (tomorrow, tomorrow))
            seconds = iter(range(2_000_000_000, 0, -1))
            real, time.time = time.time, lambda seconds=seconds: float(next(seconds))
            self.go_on("clock set back")
            time.time = real


@contextlib.contextmanager
def mounted(folder: Path, *options: str) -> Iterator[bool]:
    """Something mounted on a folder while it is needed; False where mounting is not allowed."""
    folder.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(["mount", *options, str(folder)], check=False, capture_output=True)
    try:
        yield not done.returncode
    finally:
        if not done.returncode:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)


def small_disk(campaign: Campaign, times: int) -> int:
    """A real file system of which a few pages are free; how often that was too little."""
    source, refused = random.Random("disk"), 0
    for _ in range(times):
        campaign.kind.before()
        place = source.choice([paths.RESULTS / "smoke", paths.DATA / "checkpoints"])
        with mounted(place, "-t", "tmpfs", "-o", "size=256k", "none") as allowed:
            if not allowed:
                return 0
            (place / "filler").write_bytes(bytes(4096 * (64 - source.randrange(3))))
            refused += not ended(start(campaign.kind.run))
            (place / "filler").unlink()
            for path in half_written():
                campaign.fault(f"small disk: half-written: {path}")
            if not ended(start(campaign.kind.run)):
                campaign.fault(f"small disk: does not go on: {(scratch() / 'log').read_text()[-1500:]}")
            campaign.compare(f"small disk, {place}")
    return refused


def read_only(campaign: Campaign) -> int:
    """results/ mounted read-only: refused by name before a cell is run."""
    campaign.kind.before()
    place = paths.RESULTS / "smoke"
    with mounted(place, "-t", "tmpfs", "-o", "ro", "none") as allowed:
        if allowed:
            (scratch() / "log").write_text("")
            failed = not ended(start(campaign.kind.run))
            log = (scratch() / "log").read_text()
            if not failed or f"received {place}, which is read-only" not in log or (paths.DATA / "resume").exists():
                campaign.fault(f"read-only: {log[-1500:]}")
    return int(allowed)


def trials(campaign: Campaign, short: bool) -> Iterator[tuple[str, int, Callable[[int], int | None]]]:
    """What is done to a kind, how often, by what."""
    name = campaign.kind.name
    yield "killed", 2 if short else 20, campaign.kill
    if campaign.kind.by_event:
        for number in (errno.ENOSPC, errno.EROFS):
            yield os.strerror(number), 1 if short else 10, lambda times, number=number: campaign.refuse(times, number)
    if name in ("recording", "drawing", "fetching"):
        yield "two at once", 1 if short else 5, campaign.twice
    if name in ("training", "drawing", "dvc repro") and not short:
        yield "clock set back", 3, campaign.clock
    if name == "training":
        yield "small disk", 1 if short else 10, lambda times: small_disk(campaign, times)
        yield "read-only mount", 1, lambda _: read_only(campaign)


def main(form: str) -> int:
    for name in ("tmp", "runtime"):
        (scratch() / name).mkdir()
    git("add", "-A")
    git("commit", "--quiet", "-m", "as it is")
    short, faults, rows = form == "short", [], collections.Counter()
    for experiment in ("fig_toy_divergences", "fig_gradient_shift"):
        ledger.Ledger("sinkd", experiment, "smoke").stale()  # children have imported and read the code
    chosen = SHORT if short else ([form] if form in KINDS else list(KINDS))
    for name in chosen:
        begun = time.monotonic()
        campaign = Campaign(KINDS[name], faults)
        for trial, times, act in trials(campaign, short):
            campaign.trial = trial
            done = act(times)
            rows[name, trial] = times if done is None else done
        print(f"{name}: {time.monotonic() - begun:.0f} s, one run {campaign.seconds:.1f} s", flush=True)
    print(f"\n{'kind':<24} {'what':<26} {'times':>5}  lost")
    for (name, trial), times in rows.items():
        print(f"{name:<24} {trial:<26} {times:>5}  {faults.count((name, trial)) or 'nothing'}")
    return 1 if faults else 0


def in_a_copy(form: str) -> int:
    with tempfile.TemporaryDirectory(prefix="limbeck-torture-") as folder:
        tree.RAW = Path(folder, "none")  # no kind here reads an asset
        root = tree.copy(Path(folder).resolve() / "tree", profile="smoke")
        places = {"TMPDIR": f"{folder}/tmp", "JUPYTER_RUNTIME_DIR": f"{folder}/runtime", TOKEN: folder}
        settings = {"OMP_NUM_THREADS": "1", "DVC_NO_ANALYTICS": "1", "TQDM_DISABLE": "1"}
        settings["PYTHONDONTWRITEBYTECODE"] = "1"
        environment = tree.environment(root) | places | settings
        command = [sys.executable, "-P", str(root / "tests" / "torture.py"), form]
        environment["PYTHONPATH"] += f"{os.pathsep}{root / 'tests'}"
        return subprocess.run(command, cwd=root, env=environment, check=False).returncode


if __name__ == "__main__":
    what = " ".join(sys.argv[1:])
    sys.exit(main(what) if TOKEN in os.environ else in_a_copy(what))
