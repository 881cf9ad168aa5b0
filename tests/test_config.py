"""Config files: what is read, and how mistakes are told."""

import json
import math
import typing

import pytest
from pydantic import BaseModel

from hvd_lars.config.binding import changes
from hvd_lars.config.file import bundled_configs, dump_config, find_config, load_config, parse_yaml
from hvd_lars.config.schema import KINDS, Config, json_schema
from hvd_lars.errors import UserError
from hvd_lars.settings.fields import Binds

MINIMAL = """
data: {name: digits}
schedule: {base_lr: 0.1}
train: {duration: 2 epochs, global_batch: 64}
"""


@pytest.fixture
def write(tmp_path):
    def write(text, name="c.yaml"):
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return str(path)

    return write


def lines_of(path, *overrides):
    with pytest.raises(UserError) as caught:
        load_config(path, overrides)
    return str(caught.value).splitlines()


@pytest.mark.parametrize("name", bundled_configs())
def test_bundled_configs_load_by_bare_name_and_dump_to_themselves(name, write):
    config = load_config(name)
    assert config.run.name == name
    assert load_config(write(dump_config(config))) == config


def test_the_embedded_default_is_there():
    assert {"digits", "digits-sgd-b32", "digits-sgd-b1024"} <= set(bundled_configs())


def test_defaults_and_overrides(write):
    overrides = ["train.global_batch=128", "schedule.base_lr=1e-4", "run.dir=/x/y", "run.seed=3"]
    config = load_config(write(MINIMAL), overrides)
    assert config.train.global_batch == 128
    assert config.schedule.base_lr == 1e-4
    assert config.run.dir == "/x/y"
    assert config.run.seed == 3
    assert str(config.train.duration) == "2 epochs"
    assert config.optimizer.trust_coefficient == 0.001


def test_a_config_is_frozen(write):
    config = load_config(write(MINIMAL))
    with pytest.raises(ValueError, match="frozen"):
        config.train.global_batch = 1


def test_all_errors_are_told_together_with_their_keys(write):
    path = write("""
data: {name: digits}
optimizer: {momentun: 0.9, eps: -1, adapt: some}
schedule: {base_lr: fast, warmup: gradual}
train: {duration: 20, global_batch: 0, micro_batch: 1.5}
extra: 1
""")
    lines = lines_of(path)
    assert all(line.startswith(f"{path}: ") for line in lines)
    told = {line.split(": ")[1]: line for line in lines}
    assert told.keys() == {
        "optimizer.momentun",
        "optimizer.eps",
        "optimizer.adapt",
        "schedule.base_lr",
        "train.duration",
        "train.global_batch",
        "train.micro_batch",
        "extra",
    }
    assert "unknown key; did you mean momentum?" in told["optimizer.momentun"]
    assert "found -1" in told["optimizer.eps"]
    assert "'weights', 'layer' or 'all'" in told["optimizer.adapt"]
    assert "found 'fast'; must be a valid number" in told["schedule.base_lr"]
    assert "20 is not a duration; write it as '5 epochs'" in told["train.duration"]
    assert "found 0; must be greater than or equal to 1" in told["train.global_batch"]
    assert "found 1.5; must be a valid integer" in told["train.micro_batch"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("train.globl_batch=3", "train.globl_batch: unknown key; did you mean global_batch?"),
        (
            "data.copis=3",
            "data.copis: unknown key; did you mean copies? allowed: name, val_fraction, copies",
        ),
        (
            "data.name=imagenette",
            "data.name: found 'imagenette'; allowed: digits, glyphs, synthetic",
        ),
        ("data={}", "data.name: missing; it is required"),
        ("data=3", "data: found 3; must be a section of keys and values"),
        ("train=3", "train: found 3; must be a section of keys and values"),
        ("schedule.base_lr=.nan", "schedule.base_lr: found nan"),
        ("schedule.warmup=gradual", "needs a warmup_duration above 0"),
        ("schedule.warmup_duration=5 epochs", "warmup is none; allowed: gradual, constant"),
        ("schedule.policy=multistep", "policy multistep needs milestones"),
        ("schedule.milestones=[5 epochs]", "no effect with policy poly; allowed: []"),
        ("optimizer.nesterov=yes please", "must be a valid boolean"),
        ("run.name=../up", "run.name: found '../up'"),
        ("train.eval_every=0 epochs", "eval_every is 0 epochs; it must be above 0"),
        ("comm.backend=nccl", "must be 'auto', 'horovod', 'mpi' or 'local'"),
        ("comm.bucket_mb=x", "comm.bucket_mb: found 'x'; must be a valid number or 'auto'"),
        ("data.name=[a]", "data.name: found \"['a']\"; allowed: digits"),
        ("run.seed=010", "run.seed: found '010'; must be a valid integer"),
        ("schedule.base_lr=1:30", "schedule.base_lr: found '1:30'; must be a valid number"),
        ("optimizer.name={a: 1}", "optimizer.name: found \"{'a': 1}\"; allowed: lars"),
    ],
)
def test_mistakes_on_the_command_line_are_told_as_such(write, change, message):
    (line,) = lines_of(write(MINIMAL), change)
    assert line.startswith("command line: ")
    assert message in line


def test_a_section_that_the_command_line_begins_is_its_own(write):
    path = write(MINIMAL)
    overrides = ["data={name: imagefolder, root: /x}", "data.expect.train=3"]
    assert lines_of(path, *overrides) == [
        f"command line: data.expect.{key}: missing; it is required" for key in ("eval", "classes")
    ]


@pytest.mark.parametrize("override", ["train", "=3", "train.=3", "run.seed.x=3"])
def test_what_is_no_override_is_refused(write, override):
    (line,) = lines_of(write(MINIMAL), "run.seed=1", override)
    assert line.startswith("command line: ")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1", "line 1, column 6: not valid YAML"),
        ("train: {a: 1}\ntrain: {b: 2}", "line 2, column 1: not valid YAML: key 'train' is given"),
        (b"run: \x80", "not valid YAML"),
        ("!!python/object/apply:os.system ['true']", "not valid YAML: could not determine"),
        ("[a]: 1", "line 1, column 1: not valid YAML: a key must be plain text"),
        ("run: {1: 2}", "found a key that is not text"),
        ("", "found nothing; the sections extends, recipe, run, comm, data"),
        ("- 1", "found [1]; the sections"),
        ("train: &a {x: *a}", "unknown key"),
    ],
)
def test_files_that_are_no_config(write, text, message):
    lines = lines_of(write(text))
    assert any(message in line for line in lines), lines


def test_missing_sections_are_named(write):
    assert [line.split(": ", 1)[1] for line in lines_of(write("run: {seed: 1}"))] == [
        "data: missing; it is required",
        "schedule: missing; it is required",
        "train: missing; it is required",
    ]


def test_a_config_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match=r"digit: no such file, nor a bundled config \(nearest: di"):
        find_config("digit")
    with pytest.raises(UserError, match="cannot be read: File name too long"):
        find_config("x" * 300)
    with pytest.raises(UserError, match="a path has no null character"):
        find_config("a\0b")
    with pytest.raises(UserError, match="is a folder"):
        find_config(str(tmp_path))


def test_the_schema_accepts_what_the_models_accept():
    schema = json_schema()
    assert schema["additionalProperties"] is False
    train = schema["$defs"]["Train"]["properties"]
    assert train["duration"]["type"] == "string"
    assert train["eval_every"]["default"] == "1 epochs"
    json.dumps(schema)


BASE = """
data: {name: imagefolder, root: /data, workers: 2, augment: {lighting: 0.1}}
optimizer: {momentum: 0.8, weight_decay: 1.0e-4}
schedule: {base_lr: 0.1}
train: {duration: 2 epochs, global_batch: 64}
"""


def test_a_base_holds_where_the_file_has_no_key(write):
    write(BASE, "base.yaml")
    path = write(
        "extends: base.yaml\noptimizer: {momentum: 0.7}\n"
        "data: {augment: {flip: false}}\nschedule: {base_lr: 3}\n"
    )
    config = load_config(path, ["schedule.base_lr=4"])
    assert (config.optimizer.momentum, config.optimizer.weight_decay) == (0.7, 1e-4)
    assert (config.data.workers, config.data.augment.lighting) == (2, 0.1)
    assert config.data.augment.flip is False
    assert config.schedule.base_lr == 4
    assert load_config(write(dump_config(config), "dumped.yaml")) == config


def test_a_bundled_base_is_found_from_anywhere_and_a_nearer_one_wins(write, tmp_path):
    text = "extends: base/cifar10.yaml\nschedule: {base_lr: 1}\ntrain: {global_batch: 8}\n"
    path = write(text)
    assert load_config(path).model.name == "resnet18_cifar"
    (tmp_path / "base").mkdir()
    write(BASE, "base/cifar10.yaml")
    assert load_config(path).data.name == "imagefolder"


def test_a_data_set_of_another_kind_takes_nothing_from_the_base(write):
    write(BASE, "base.yaml")
    path = write("extends: base.yaml\ndata: {name: digits}\n")
    assert load_config(path).data.copies == 12
    path = write("extends: base.yaml\n")
    overrides = ["data.image_size=16", "data.name=synthetic"]  # in whichever order
    assert load_config(path, overrides).data.image_size == 16
    shards = load_config(path, ["data.name=shards", "data.root=/s"]).data  # the same images
    assert (shards.workers, shards.augment.lighting, shards.root) == (2, 0.1, "/s")
    (line,) = lines_of(path, "data.name=cifar10")
    assert line == "command line: data.root: missing; it is required"
    assert load_config(path, ["data.name=imagefolder"]).data.workers == 2  # the same kind


def test_mistakes_in_a_base_are_told_as_its_own(write):
    base = write(BASE.replace("momentum: 0.8", "momentun: 0.8"), "base.yaml")
    path = write("extends: base.yaml\ntrain: {global_batch: 0}\n")
    found = lines_of(path)
    assert found[0].startswith(f"{base}: optimizer.momentun: unknown key; did you mean momentum?")
    assert found[1].startswith(f"{path}: train.global_batch: found 0")


@pytest.mark.parametrize(
    ("base", "text", "message"),
    [
        (None, "extends: base.yaml", "c.yaml: extends: "),
        (None, "extends: base.yaml", "no such file, nor"),
        ("extends: other.yaml", "extends: base.yaml", "an extended file cannot extend another"),
        ("- 1", "extends: base.yaml", "base.yaml: found [1]; the sections"),
        (BASE, "extends: 3", "extends: found 3; must be a valid string"),
        (BASE, 'extends: "a\\0b"', "no such file, nor"),
    ],
)
def test_a_base_that_cannot_be_taken(write, base, text, message):
    if base is not None:
        write(base, "base.yaml")
    assert any(message in line for line in lines_of(write(text)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("data.augment.crop_scale=[0.5, 0.1]", "crop_scale is [0.5, 0.1]; needs 0 < least"),
        ("data.augment.hue=0.7", "data.augment.hue: found 0.7; must be less than or equal to 0.5"),
        ("data.augment.mixupp=1", "data.augment.mixupp: unknown key; did you mean mixup?"),
        (
            "data.progressive=[{epoch: 3, image_size: 9}, {epoch: 3, image_size: 9}]",
            "epochs [3, 3]",
        ),
        ("data.image_size=300", "eval_resize is 256; at least image_size 300"),
        ("model.ema_decay=1", "model.ema_decay: found 1; must be less than 1"),
        ("data.expect={train: 3}", "data.expect.eval: missing; it is required"),
    ],
)
def test_mistakes_in_the_new_sections(write, change, message):
    found = lines_of(write(BASE), change)
    assert any(message in line for line in found), found


def test_extends_is_for_files(write):
    (line,) = lines_of(write(BASE), "extends=base.yaml")
    assert line == "command line: extends: only a file can extend another"


def test_cifar_keeps_its_crop_whatever_else_is_asked_for():
    config = load_config("cifar10-sgd-b128", ["data.augment.mixup=0.2"])
    assert config.data.augment.crop == "padded"


def test_a_window_fits_into_the_resized_image(write):
    window = ["data.augment.crop=window", "data.progressive=[{epoch: 1, image_size: 288}]"]
    (line,) = lines_of(write(BASE), *window)
    assert "eval_resize is 256; at least 288, the largest side" in line


def sections(model):
    """A section's model and all below it."""
    yield model
    for field in model.model_fields.values():
        for part in (field.annotation, *typing.get_args(field.annotation)):
            if isinstance(part, type) and issubclass(part, BaseModel):
                yield from sections(part)


def test_every_key_says_what_it_binds():
    found = {each.__name__: each for each in sections(Config)}
    assert {"Run", "LarsSettings", "SgdSettings", "ShardsData", "Expected", "Resize"} <= set(found)
    own = [name for name in Config.model_fields if name not in ("extends", "recipe")]
    for name, section in found.items():
        for key, field in section.model_fields.items():
            if name != "Config" or key not in own:  # those are sections
                assert field.json_schema_extra["binds"] in typing.get_args(Binds), f"{name}.{key}"
    for section, kinds in KINDS.items():
        assert set(kinds) <= set(found.values()), section


def test_a_key_binds_what_it_says():
    before = load_config("resnet50-lars-b8192")
    after = load_config(
        "resnet50-lars-b8192",
        ["optimizer.momentum=0.8", "model.ema_decay=0.9", "train.max_skipped_steps=3",
         "train.micro_batch=7", "data.augment.flip=false", "data.expect=null"],
    )  # fmt: skip
    changed = {
        bound: changes(before, after, bound, lambda key, *values: key)
        for bound in ("run", "recipe")
    }
    both = ["data.augment.flip", "optimizer.momentum"]
    assert changed["run"] == sorted([*both, "model.ema_decay"])
    assert changed["recipe"] == sorted([*both, "train.max_skipped_steps"])
    allowed = changes(before, after, "run", lambda key, *_: key, ["optimizer", "data.augment.flip"])
    assert allowed == ["model.ema_decay"]


def test_another_optimizer_is_chosen_by_its_name(write):
    assert load_config(write(MINIMAL)).optimizer.name == "lars"
    chosen = load_config(write(MINIMAL), ["optimizer.name=sgd", "optimizer.momentum=0.5"])
    assert (chosen.optimizer.name, chosen.optimizer.momentum) == ("sgd", 0.5)
    with pytest.raises(UserError, match="optimizer.name: found 'adam'; allowed: lars, sgd"):
        load_config(write(MINIMAL), ["optimizer.name=adam"])
    with pytest.raises(UserError, match="optimizer.momentumm: unknown key; did you mean momentum?"):
        load_config(write(MINIMAL), ["optimizer.momentumm=0.5"])


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4), ("1E3", 1000.0), (".5", 0.5), ("5.", 5.0), ("+3", 3), ("-0", 0),
        ("1_000", 1000), ("0x10", 16), ("1_0.5e1", 105.0), ("-.inf", -math.inf),
        ("010", "010"), ("1:30", "1:30"), ("1:30.5", "1:30.5"), ("0o17", "0o17"),
        ("1.2.3", "1.2.3"), ("e3", "e3"),
    ],
)  # fmt: skip
def test_numbers_are_those_of_yaml_1_2(text, value):
    found = parse_yaml(text, "here")
    assert found == value
    assert type(found) is type(value)
