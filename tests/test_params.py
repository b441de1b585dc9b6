import shutil
from dataclasses import asdict, dataclass

import pytest
import yaml
from dvc.utils.hydra import apply_overrides
from dvc.utils.serialize import _yaml

from limbeck import digests, params, paths


@dataclass(frozen=True)
class Section:
    rate: float
    name: str
    sizes: tuple[int, ...]


GOOD = {"rate": 1, "name": "a", "sizes": [1, 2]}


@pytest.fixture
def write(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "PARAMS", tmp_path)
    monkeypatch.setattr(paths, "ROOT", tmp_path)

    def write(section):
        (tmp_path / "toy.yaml").write_text(yaml.safe_dump({"experiment": {"default": section}}))

    return write


def test_a_section_becomes_the_dataclass_with_lists_as_tuples(write):
    write(GOOD)
    assert params.load("toy", "experiment", "default", Section) == Section(1.0, "a", (1, 2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"extra": 1}, "unknown key extra; expected name, rate, sizes"),
        ({"rate": "fast"}, "rate must be float, got 'fast'"),
        ({"rate": True}, "rate must be float, got True"),
        ({"sizes": 3}, r"sizes must be tuple.*got 3"),
        ({"sizes": [1.5]}, "sizes must be int, got 1.5"),
    ],
)
def test_a_bad_value_is_named_with_what_was_expected(write, change, message):
    write(GOOD | change)
    with pytest.raises(ValueError, match=message):
        params.load("toy", "experiment", "default", Section)


def test_a_missing_key_is_named(write):
    write({"rate": 1.0, "name": "a"})
    with pytest.raises(ValueError, match="missing key sizes"):
        params.load("toy", "experiment", "default", Section)


def test_an_unknown_experiment_profile_or_file_lists_what_there_is(write):
    write(GOOD)
    with pytest.raises(ValueError, match=r"experiment must be one of experiment; got 'other'"):
        params.load("toy", "other", "default", Section)
    with pytest.raises(ValueError, match=r"must be one of default; got 'full'"):
        params.load("toy", "experiment", "full", Section)
    with pytest.raises(ValueError, match=r"expected a parameter file at"):
        params.load("absent", "experiment", "default", Section)


@dataclass(frozen=True)
class Optimiser:
    rate: float
    clip: float


@dataclass(frozen=True)
class Loop:
    steps: int
    optimiser: Optimiser

    def __post_init__(self) -> None:
        params.positive(steps=self.steps)


@dataclass(frozen=True)
class Data:
    name: str
    sizes: tuple[int, ...]


@dataclass(frozen=True)
class Parts:
    seed: int
    data: Data
    loop: Loop
    name_of_arm: str


PARTS = {"steps": 3, "sizes": [1, 2], "clip": 1, "name_of_arm": "b", "rate": 0.5, "name": "a", "seed": 7}


def test_a_part_takes_the_keys_that_are_its_fields_and_flat_gives_them_back(write):
    write(PARTS)
    loaded = params.load("toy", "experiment", "default", Parts)
    assert loaded == Parts(7, Data("a", (1, 2)), Loop(3, Optimiser(0.5, 1.0)), "b")
    assert params.flat(loaded) == PARTS | {"sizes": (1, 2)}
    assert type(params.flat(loaded)["clip"]) is float


def test_flat_of_an_undivided_section_is_what_asdict_gives(write):
    write(GOOD)
    loaded = params.load("toy", "experiment", "default", Section)
    assert list(params.flat(loaded).items()) == list(asdict(loaded).items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loop": 1}, "unknown key loop; expected clip, name, name_of_arm, rate, seed, sizes, steps"),
        ({"clip": "far"}, "clip must be float, got 'far'"),
        ({"steps": 0}, "steps must be above 0, got 0"),
    ],
)
def test_an_error_of_a_part_names_the_section(write, change, message):
    write(PARTS | change)
    with pytest.raises(ValueError, match=f"^params/toy.yaml, experiment, default: {message}$"):
        params.load("toy", "experiment", "default", Parts)


def test_a_missing_key_of_a_part_is_named(write):
    write({name: value for name, value in PARTS.items() if name not in ("clip", "seed")})
    with pytest.raises(ValueError, match=r"^params/toy\.yaml, experiment, default: missing key clip, seed$"):
        params.load("toy", "experiment", "default", Parts)


def test_two_parts_that_claim_the_same_key_are_named(write):
    @dataclass(frozen=True)
    class Twice:
        schedule: Optimiser
        loop: Loop

    write({"rate": 1.0, "clip": 1.0, "steps": 1})
    message = "default: key clip is claimed by Twice.schedule and Twice.loop.optimiser, expected one of them"
    with pytest.raises(ValueError, match=message):
        params.load("toy", "experiment", "default", Twice)


def test_a_part_and_the_whole_that_claim_the_same_key_are_named(write):
    @dataclass(frozen=True)
    class Both:
        rate: float
        loop: Loop

    write({"rate": 1.0, "clip": 1.0, "steps": 1})
    with pytest.raises(ValueError, match=r"key rate is claimed by Both and Both\.loop\.optimiser"):
        params.load("toy", "experiment", "default", Both)


LAYERED = {
    "shared": {"slow": {"rate": 0.5, "sizes": [1]}, "wide": {"sizes": [8]}},
    "one": {
        "default": {"from": "slow wide", "name": "a"},
        "smoke": {"sizes": [2]},
        "paper": {"name": "b", "from": "slow"},
        "full": {},
    },
    "two": {"full": {"name": "c", "from": "wide slow"}, "smoke": {"from": "wide"}},
    "three": {"smoke": {"rate": 1.0, "name": "d", "sizes": []}},
}


@pytest.mark.parametrize("sort_keys", [False, True])
@pytest.mark.parametrize(
    ("experiment", "profile", "expected"),
    [
        ("one", "default", Section(0.5, "a", (8,))),
        ("one", "smoke", Section(0.5, "a", (2,))),
        ("one", "paper", Section(0.5, "b", (1,))),
        ("one", "full", Section(0.5, "a", (8,))),
        ("two", "full", Section(0.5, "c", (1,))),
        ("two", "smoke", Section(0.5, "c", (8,))),
        ("three", "smoke", Section(1.0, "d", ())),
    ],
)
def test_a_section_is_laid_over_its_groups_and_these_over_the_base_section(
    tmp_path, monkeypatch, sort_keys, experiment, profile, expected
):
    monkeypatch.setattr(paths, "PARAMS", tmp_path)
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump(LAYERED, sort_keys=sort_keys))
    assert params.load("toy", experiment, profile, Section) == expected


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ("slow fast", "params/toy.yaml, one, smoke: from must be one of slow, wide; got 'fast'"),
        (["slow"], r"params/toy.yaml, one, smoke: from must be names with spaces between them, got \['slow'\]"),
    ],
)
def test_a_section_that_starts_from_no_group_of_the_file_is_refused(tmp_path, monkeypatch, groups, message):
    monkeypatch.setattr(paths, "PARAMS", tmp_path)
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump(LAYERED | {"one": {"smoke": {"from": groups}}}))
    with pytest.raises(ValueError, match=message):
        params.load("toy", "one", "smoke", Section)


def test_a_group_starts_from_no_other_group(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "PARAMS", tmp_path)
    shared = {"slow": {"rate": 0.5, "sizes": [1], "from": "wide"}, "wide": {"sizes": [8]}}
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump(LAYERED | {"shared": shared}))
    with pytest.raises(ValueError, match="unknown key from"):
        params.load("toy", "one", "default", Section)


def test_shared_is_no_experiment(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "PARAMS", tmp_path)
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump(LAYERED, sort_keys=False))
    assert list(params.experiments("toy")) == ["one", "two", "three"]
    with pytest.raises(ValueError, match="experiment must be one of one, two, three; got 'shared'"):
        params.load("toy", "shared", "slow", Section)


@pytest.mark.parametrize(
    "change", [{"profile": p} for p in ("big", "full")] + [{"threads": 0}, {"precision": "float8"}, {"colour": "red"}]
)
def test_params_yaml_is_checked(tmp_path, monkeypatch, change):
    good = yaml.safe_load((paths.ROOT / "params.yaml").read_text())
    monkeypatch.setattr(paths, "ROOT", tmp_path)
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(good | change))
    with pytest.raises(ValueError, match=next(iter(change))):
        params.settings()


def test_every_committed_section_loads_into_its_experiment():
    import importlib  # noqa: PLC0415

    for file in paths.PARAMS.glob("*.yaml"):
        for experiment, profiles in params.experiments(file.stem).items():
            if not set(profiles) & set(params.PROFILES):
                continue  # timed by `make bench`
            module = importlib.import_module(digests.module_of(file.stem, experiment))
            assert set(profiles) <= set(params.PROFILES)
            for profile in profiles:
                section = params.load(file.stem, experiment, profile, module.Params)
                assert len({str(cell.coordinates) for cell in module.cells(section, range(5))}) > 1


@pytest.mark.parametrize("paper", ["kdrl", "nola", "sinkd"])
def test_a_params_file_has_the_form_that_dvc_writes_and_no_anchors(paper):
    text = (paths.PARAMS / f"{paper}.yaml").read_text()
    assert _yaml.dumps_yaml(_yaml.parse_yaml_for_update(text, paper)) == text
    assert not [token for token in yaml.scan(text) if isinstance(token, (yaml.AnchorToken, yaml.AliasToken))]
    assert len(text.splitlines()) <= 600


@pytest.mark.parametrize(
    ("paper", "override"),
    [
        ("kdrl", "fig_kl_gradients.default.draws=3"),
        ("kdrl", "shared.comparison.steps=3"),
        ("kdrl", "shared.chains.start_steps.1=3"),
        ("nola", "table_text_full.full.steps=3"),
        ("nola", "shared.tiny_vision.first_batch=3"),
        ("sinkd", "shared.encoder.learning_rate=3"),
        ("sinkd", "table_encoder.default.tasks.2=sst2"),
    ],
)
def test_a_value_that_dvc_sets_changes_one_line(tmp_path, paper, override):
    text = (paths.PARAMS / f"{paper}.yaml").read_text()
    file = tmp_path / f"{paper}.yaml"
    file.write_text(text)
    apply_overrides(file, [override])
    before, after = text.splitlines(), file.read_text().splitlines()
    assert len(before) == len(after)
    assert sum(old != new for old, new in zip(before, after, strict=True)) == 1


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("table_divergences", {"epsilon": -0.1}, "epsilon must be above 0, got -0.1"),
        ("table_divergences", {"arms": ["ce", "wasserstein"]}, "arm must be ce or one of .*'wasserstein'"),
        ("table_divergences", {"split_sizes": [10]}, "split_sizes must hold"),
        ("fig_toy_divergences", {"epsilons": [0.1, -1.0]}, "epsilon must be above 0, got -1.0"),
        ("fig_toy_divergences", {"arms": ["hellinger"]}, "arm must be one of"),
    ],
)
def test_what_no_type_can_say_is_refused_before_anything_runs(tmp_path, monkeypatch, name, change, message):
    from limbeck.experiments import ledger  # noqa: PLC0415

    module = digests.module_of("sinkd", name)
    sections = yaml.safe_load((paths.PARAMS / "sinkd.yaml").read_text())
    sections[name]["smoke"] |= change
    shutil.copy(paths.ROOT / "params.yaml", tmp_path)
    for constant in ("ROOT", "PARAMS", "RESULTS", "DATA"):
        monkeypatch.setattr(paths, constant, tmp_path / ("" if constant == "ROOT" else constant.lower()))
    monkeypatch.setattr("limbeck.digests.module_of", lambda *_: module)
    monkeypatch.setattr("limbeck.digests.of_experiment", lambda *_: "code")
    paths.PARAMS.mkdir()
    (paths.PARAMS / "sinkd.yaml").write_text(yaml.safe_dump(sections))
    with pytest.raises(ValueError, match=message):
        ledger.run("sinkd", name, "smoke")
    assert not paths.RESULTS.exists()
    assert not paths.DATA.exists()
