"""What DVC would run: nothing after a commit, and after a change exactly what depends on it."""

import hashlib
import json
import re
import subprocess
import sys
import time

import nbformat
import psutil
import pytest
import yaml
from safetensors import safe_open

import tree
from limbeck import assets, digests, paths
from limbeck.workflow import stages

SINKD = {f"sinkd-{name}" for name in digests.experiments("sinkd")} & set(stages.stages("${profile}"))
KDRL = {"kdrl-fig_kl_gradients", "kdrl-table_starts", "kdrl-table_main"}
NOLA = {"nola-table_text", "nola-fig_pranc_loss", "nola-fig_rank", "nola-table_vision", "nola-table_storage"}
READERS = {"kdrl-fig_learning_curves", "kdrl-table_out_of_domain"}  # of table_main's records
DRAW = SINKD | KDRL | NOLA | READERS


def training(names):
    """The stages that train what these exhibits read."""
    return {f"{name}-train" for name in names}


def test_the_committed_pipelines_are_those_that_the_notebooks_code_and_params_give():
    for path, text in stages.texts().items():
        assert path.read_text() == text, "run `make pipeline`"


def test_every_experiment_has_a_smoke_and_a_paper_section_and_is_retrained_by_default_or_full():
    for paper in stages.papers():
        default, full, smoke, paper_scale = (
            set(stages.experiments(paper, profile)) for profile in ("default", "full", "smoke", "paper")
        )
        assert default | full == smoke == paper_scale
        assert default


def test_every_stage_of_full_writes_to_full_and_every_other_to_the_chosen_profile():
    for name, stage in stages.stages("full").items():
        assert all("/full/" in next(iter(out)) for out in stage["outs"]), name
    for stage in stages.stages("${profile}").values():
        assert all("/${profile}/" in next(iter(out)) for out in stage["outs"])


def test_the_pipelines_have_no_file_that_a_clone_lacks():
    for file in ("dvc.yaml", "pipelines/full/dvc.yaml"):
        for stage in yaml.safe_load((paths.ROOT / file).read_text())["stages"].values():
            outs = [next(iter(out)) for out in (*stage["outs"], *stage.get("metrics", ()))]
            names = [name.replace("${profile}", "default") for name in (*outs, *stage.get("deps", ()))]
            assert all((paths.ROOT / name).exists() for name in names)
            ignored = subprocess.run(["git", "check-ignore", *names], cwd=paths.ROOT, capture_output=True, check=False)
            assert (ignored.returncode, ignored.stdout) == (1, b"")


def test_a_stage_fetches_the_assets_of_its_section_and_depends_on_their_checksums():
    stage = stages.stages("full")["nola-table_vision_full-train"]
    assert stage["cmd"][0] == "python -m limbeck.assets efficientnet_lite0 mnist"
    assert {"data/assets.yaml": ["efficientnet_lite0.sha256", "mnist.sha256"]} in stage["params"]
    assert len(stages.stages("full")["kdrl-table_starts-train"]["cmd"]) == 1


def test_a_section_needs_the_assets_that_it_names_at_any_depth():
    section = {"model": "minilm", "tasks": ["r52", "20ng"], "sizes": {"vader_movie": [1, 2]}, "steps": 3}
    assert assets.named(stages._words(section)) == ["minilm", "topics", "vader"]


def test_a_stage_takes_its_own_digest_and_no_file_of_code():
    for profile in ("${profile}", "full"):
        for name, stage in stages.stages(profile).items():
            paper, _, key = name.partition("-")
            own = [f"{paper}.{key}", f"{paper}.train"] if name.endswith("-train") else [f"{paper}.{key}"]
            assert stage["params"][0] == {"digests.json": own}
            assert not [file for file in stage.get("deps", ()) if file.startswith(("src", "notebooks"))]


def test_the_inputs_of_a_run_are_its_files_and_the_digests_of_its_code_and_notebook():
    for notebook, parameters in (("train", {"experiment": "table_main"}), ("table_main", {})):
        path = paths.NOTEBOOKS / "kdrl" / f"{notebook}.ipynb"
        inputs = stages.inputs(path, parameters | {"profile": "default"})
        read = "params/kdrl.yaml" if parameters else "results/default/kdrl/table_main.jsonl"
        assert inputs[read] == hashlib.sha256((paths.ROOT / read).read_bytes()).hexdigest()
        expected = digests.of_experiment("kdrl", "table_main") if parameters else digests.of_notebook(path)
        assert inputs["code"] == expected


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    return tree.copy(tmp_path_factory.mktemp("tree"))


def dvc(root, *arguments):
    done = subprocess.run(
        ["dvc", *arguments], cwd=root, env=tree.environment(root), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def stale(root):
    """The stages of which a dependency or parameter changed since dvc.lock."""
    status = json.loads(dvc(root, "status", "dvc.yaml", "--json"))
    return {stage for stage, why in status.items() if any("changed deps" in entry for entry in why)}


def digest(root):
    """Bring the copy's digests up to date, as the first stage does."""
    command = [sys.executable, "-m", "limbeck.digests"]
    subprocess.run(command, cwd=root, env=tree.environment(root), check=True)


def after(root, name, change):
    """What `change` of a file's text makes stale but the digests themselves; the file is put back."""
    path, written = root / name, root / "digests.json"
    text, before = path.read_text(), written.read_text()
    try:
        path.write_text(change(text))
        if name.startswith(("src", "notebooks")):
            digest(root)
        return stale(root) - {"digests"}
    finally:
        path.write_text(text)
        written.write_text(before)


@pytest.mark.slow
def test_nothing_is_left_to_run_in_what_is_committed(copy):
    for pipeline in ("dvc.yaml", "pipelines/full/dvc.yaml"):
        assert dvc(copy, "status", pipeline) == "Data and pipelines are up to date.\n"
        assert "Running stage" not in dvc(copy, "repro", "--dry", pipeline)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "old", "new", "expected"),
    [
        ("src/limbeck/exhibits/palette.py", "#d55e00", "#d55e01", DRAW),
        ("src/limbeck/exhibits/canvas.py", "#8a8a8a", "#8a8a8b", DRAW),
        ("src/limbeck/exhibits/limbeck.mplstyle", "font.size: 9", "font.size: 10", DRAW),
        ("src/limbeck/losses/transport.py", "-600.0", "-601.0", training(SINKD)),
        ("src/limbeck/tasks/chain_sum.py", "_POOL = 4", "_POOL = 5", training(KDRL) - {"kdrl-fig_kl_gradients-train"}),
        ("src/limbeck/tasks/chain_sum.py", "# drawn examples", "# examples drawn", set()),
        ("params.yaml", "seeds: [0, 1, 2, 3, 4]", "seeds: [0, 1, 2, 3, 4, 5]", training(SINKD | KDRL | NOLA)),
        ("data/claims/sinkd.yaml", "id: encoder-kl-over-ce", "id: encoder-kl-before-ce", SINKD | {"metrics"}),
    ],
)
def test_a_change_makes_stale_exactly_what_depends_on_it(copy, name, old, new, expected):
    assert old in (copy / name).read_text()
    assert after(copy, name, lambda text: text.replace(old, new, 1)) == expected


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "old", "new", "expected"),
    [
        ("src/limbeck/tasks/chain_sum.py", "_POOL = 4", "_POOL = 5", training(KDRL) - {"kdrl-fig_kl_gradients-train"}),
        ("src/limbeck/exhibits/canvas.py", "#8a8a8a", "#8a8a8b", DRAW),
        ("data/claims/sinkd.yaml", "id: encoder-kl-over-ce", "id: encoder-kl-before-ce", SINKD),
    ],
)
def test_the_lock_takes_neither_records_of_other_code_nor_exhibits_drawn_otherwise(copy, name, old, new, expected):
    before = {file: (copy / file).read_text() for file in (name, "digests.json", "dvc.lock", "pipelines/full/dvc.lock")}
    try:
        (copy / name).write_text(before[name].replace(old, new, 1))
        digest(copy)
        command = [sys.executable, "-m", "limbeck.workflow.lock"]
        subprocess.run(command, cwd=copy, env=tree.environment(copy), check=True)
        assert stale(copy) - {"metrics"} == expected
    finally:
        for file, text in before.items():
            (copy / file).write_text(text)


@pytest.mark.slow
def test_a_changed_section_makes_only_its_experiment_stale(copy):
    def change(text):
        sections = yaml.safe_load(text)
        sections["fig_toy_divergences"]["default"]["steps"] += 1
        sections["table_encoder"]["smoke"]["tasks"] = ["r52"]
        return yaml.safe_dump(sections)

    assert after(copy, "params/sinkd.yaml", change) == {"sinkd-fig_toy_divergences-train"}


@pytest.fixture(scope="module")
def places():
    """Of the default pipeline and the full one, what each training stage reads of parameter files and notebooks."""
    return [
        {
            name: {place for entry in stage["params"] for places in entry.values() for place in places}
            for name, stage in stages.stages(profile).items()
        }
        for profile in ("${profile}", "full")
    ]


@pytest.mark.parametrize(
    ("group", "default", "full"),
    [
        ("chains", {"kdrl-table_starts", "kdrl-table_main"}, {"kdrl-table_starts", "kdrl-ablations"}),
        ("tiny_run", {"kdrl-table_main"}, set()),
        ("budgets", {"nola-fig_pranc_loss"}, {"nola-fig_convolution"}),
        ("tiny_budgets", {"nola-fig_pranc_loss"}, set()),
        ("vision", {"nola-table_vision"}, {"nola-table_vision_full"}),
        ("one_pair", {"sinkd-fig_transport_plan", "sinkd-fig_permutation"}, set()),
        ("one_text_pair", set(), {"sinkd-fig_hyperparameters", "sinkd-fig_debiased"}),
    ],
)
def test_a_group_of_shared_reaches_exactly_the_experiments_that_start_from_it(places, group, default, full):
    readers = [{name for name in stages if f"shared.{group}" in stages[name]} for stages in places]
    assert readers == [training(default), training(full)]


def test_a_stage_reads_its_own_section_and_the_one_below_it(places):
    default, full = places
    expected = {"shared.chains", "shared.spread", "table_starts.default", "table_starts.full"}
    assert {place for place in full["kdrl-table_starts-train"] if place.startswith(("shared", "table"))} == expected
    assert {"table_starts.${profile}", "table_starts.default"} <= default["kdrl-table_starts-train"]
    assert not [place for place in default["kdrl-table_starts-train"] if place.endswith((".smoke", ".paper", ".full"))]


@pytest.mark.slow
def test_a_changed_line_of_shared_makes_stale_exactly_the_experiments_that_start_from_it(copy):
    def change(text):
        return text.replace("    train_size: 300 ", "    train_size: 301 ")

    assert after(copy, "params/nola.yaml", change) == {"nola-fig_pranc_loss-train"}


@pytest.mark.slow
def test_a_changed_record_makes_stale_every_exhibit_that_reads_it(copy):
    name = "results/default/kdrl/table_main.jsonl"
    assert after(copy, name, lambda text: text + " ") == {"kdrl-table_main", "metrics", *READERS}


def test_an_experiment_that_names_another_depends_on_its_records_and_has_it_trained_where_it_was_not():
    full = stages.stages("full")
    measured = "results/full/kdrl/table_starts.jsonl"
    readers = {name for name, stage in full.items() if measured in stage.get("deps", [])}
    assert readers == {"kdrl-table_starts", "kdrl-ablations-train"}
    trained = [command.split("experiment=")[1].split()[0] for command in full["kdrl-ablations-train"]["cmd"]]
    assert trained == ["table_starts", "ablations"]


def test_only_experiments_of_which_an_exhibit_draws_curves_have_them_written_out():
    assert stages.curved("${profile}") == stages.curved("smoke") == [("kdrl", "table_main")]
    assert stages.curved("full") == [("kdrl", "ablations"), ("kdrl", "fig_real_model")]


@pytest.mark.slow
def test_saving_a_notebook_in_jupyter_makes_nothing_stale_but_changing_its_code_does(copy):
    def save(text):
        opened = nbformat.reads(text, as_version=4)
        opened.metadata["language_info"] = {"name": "python", "version": "3.11.7", "mimetype": "text/x-python"}
        for count, cell in enumerate(opened.cells):
            cell.metadata["collapsed"] = False
            if cell.cell_type == "code":
                cell.execution_count = count
                cell.outputs = [nbformat.v4.new_output("stream", text="out")]
        return nbformat.writes(opened)

    def edit(text):
        return text.replace('exhibit = \\"fig_toy', 'exhibit  = \\"fig_toy')

    name = "notebooks/sinkd/fig_toy_divergences.ipynb"
    assert after(copy, name, save) == set()
    assert after(copy, name, edit) == {"sinkd-fig_toy_divergences"}


@pytest.mark.slow
def test_a_cache_of_python_makes_nothing_stale(copy):
    for folder in ("src/limbeck/__pycache__", "src/limbeck/experiments/__pycache__"):
        (copy / folder).mkdir(parents=True, exist_ok=True)
        (copy / folder / "x.cpython-311.pyc").write_bytes(b"x")
    assert stale(copy) == set()


def train(root, log):
    command = [sys.executable, "-m", "limbeck.workflow.notebooks", "notebooks/sinkd/train.ipynb"]
    command += ["experiment=table_divergences", "profile=smoke"]
    return subprocess.Popen(
        command, cwd=root, env=tree.environment(root), stdout=log, stderr=subprocess.STDOUT, start_new_session=True
    )


def records_file(root):
    return root / "results" / "smoke" / "sinkd" / "table_divergences.jsonl"


def records(root):
    """The lines of the records, by the coordinates of their cells."""
    lines = records_file(root).read_text().splitlines()
    return {json.dumps(json.loads(line)["cell"]): line for line in lines}


def mark(root):
    """Change what no cell reads, so that a record that was kept differs from one that was made again; the lines."""
    marked = [json.dumps(json.loads(line) | {"trainable_parameters": 0}) for line in records(root).values()]
    records_file(root).write_text("\n".join([*marked, ""]))
    return records(root)


def made_since(marked, root):
    return {cell for cell, line in records(root).items() if marked.get(cell) != line}


def set_seeds(root, seeds):
    settings = root / "params.yaml"
    settings.write_text(re.sub(r"seeds: \[.*?\]", f"seeds: {seeds}", settings.read_text()))


def set_workers(root, workers):
    settings = root / "params.yaml"
    settings.write_text(re.sub(r"workers: \d+", f"workers: {workers}", settings.read_text()))


ARMS = ("ce", "ce+kl", "ce+kl+sinkhorn", "ce+value", "ce+zero_one", "ce+l1")
FINAL, STEPS = 11, 3  # the teacher and 10 selection runs come before; a final cell of the smoke profile has 3 steps


def final(arm, seed):
    return json.dumps({"phase": "final", "task": "20ng", "student": "first-2", "arm": arm, "seed": seed})


def settled_cells(root):
    file = root / "data" / "checkpoints" / "smoke" / "sinkd" / "table_divergences" / "settled.json"
    return set(json.loads(file.read_text())) if file.is_file() else set()


def stop_in_a_final_cell(running, root):
    """Suspend the run with everything it started once a final cell has saved a step but not its last; that step."""
    while running.is_running() and running.status() != psutil.STATUS_ZOMBIE:
        family = [running, *running.children(recursive=True)]
        for process in family:
            process.suspend()
        settled = settled_cells(root)
        states = [p for p in (root / "data" / "resume").rglob("state.safetensors") if p.parent.name not in settled]
        for state in states if len(settled) >= FINAL else ():
            with safe_open(state, "pt") as file:
                step = json.loads(file.metadata()["state"])["step"]
            if step < STEPS:
                return step
        for process in family:
            process.resume()
        time.sleep(0.02)
    raise AssertionError("the run ended before it could be stopped in a final cell")


@pytest.mark.slow
def test_a_run_killed_in_the_middle_of_a_cell_goes_on_there_and_an_added_seed_runs_alone(tmp_path):
    whole, killed = (tree.copy((tmp_path / name).resolve()) for name in ("whole", "killed"))
    for root in (whole, killed):
        set_seeds(root, "[0]")
    set_workers(whole, 1)
    with (tmp_path / "log").open("w") as log:
        assert train(whole, log).wait() == 0, (tmp_path / "log").read_text()
        running = psutil.Process(train(killed, log).pid)
        saved = stop_in_a_final_cell(running, killed)
        for process in [*running.children(recursive=True), running]:
            process.kill()
        running.wait()
        assert 0 < saved < STEPS
        done = records(killed)
        marked = mark(killed)
        assert train(killed, log).wait() == 0, (tmp_path / "log").read_text()
    complete, resumed = records(whole), records(killed)
    assert done == {cell: complete[cell] for cell in done}
    assert list(resumed) == list(complete)
    assert made_since(marked, killed) == set(complete) - set(done) != set()
    assert all(resumed[cell] == complete[cell] for cell in set(complete) - set(done))
    assert not list((killed / "data" / "resume").rglob("state.safetensors"))
    set_seeds(killed, "[0, 1]")
    marked = mark(killed)
    with (tmp_path / "log").open("w") as log:
        assert train(killed, log).wait() == 0, (tmp_path / "log").read_text()
    assert made_since(marked, killed) == {final(arm, 1) for arm in ARMS}
    for arm in ARMS:
        one, other = (json.loads(records(killed)[final(arm, seed)]) for seed in (0, 1))
        assert one["curve"] != other["curve"]
