"""The trainer's configuration: from TOML and the command line, and what either refuses."""

import math
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdkernels import FusedKDLoss
from kdkernels.__main__ import main
from kdkernels.train import cli, config
from kdkernels.train.config import Config
from kdkernels.train.errors import SetupError

# Of every option a value that is not the default, as it stands on the command line.
GIVEN = dict(
    line.split(maxsplit=1)
    for line in """
seeds 5
first_seed 7
baselines false
wandb my-project
data.name digits
data.folder /images of mine
data.size 32
data.channels 3
data.corrupt skip
data.validation 0.2
data.test 0.3
data.split_seed 4
data.labelled 0
data.mean [0.1]
data.std [0.2]
data.workers 2
augment.crop 0
augment.flip 0.5
augment.rotation 10
augment.color 0.3
augment.randaugment 9
augment.mixup 0.2
augment.cutmix 1
augment.fgsm 0.03
augment.fgsm_share 0.25
student.name resnet14
student.options {width=8,dropout=0.1}
student.weights student.safetensors
student.freeze ["stem","stages.0.*"]
teacher.name resnet20
teacher.options {}
teacher.weights teacher.pt
teacher.others [{name="resnet8"},{name="resnet14",options={width=4}}]
teacher.epochs 3
teacher.learning_rate 1e-3
teacher.cache float16
teacher.cache_top_k 5
loss {alpha=0.5,divergence="jsd"}
loss.temperature [1.0,4.0]
loss.alpha 0.5
loss.label_smoothing 0.1
loss.weight [1.0,2.0]
loss.distill_ignored false
loss.backend reference
loss.divergence {forward_kl=1.0,reverse_kl=0.5}
loss.beta 0.3
loss.skew 0.3
loss.divergence_alpha 0.3
loss.dkd_alpha 2
loss.dkd_beta 2
loss.nkd_gamma 2
loss.wsld_alpha 2
loss.dist_beta 2
loss.dist_gamma 2
loss.teacher_temperature 2
loss.temperature_reduction sum
loss.scale_by_t2 false
loss.standardize true
loss.taid 0.5
loss.agreement 0.1
loss.entropy_gap 0.1
loss.agreement_reduction sum
loss.teacher_weights [1,2]
loss.ensemble logits
loss.logit_softcap 30
loss.logit_scale [1.0,2.0]
loss.z_loss 1e-4
loss.num_classes 10
distill.hints {"stages.0"="stages.1"}
distill.hint_weight 2
distill.attention {stem="stem"}
distill.attention_weight 1
distill.learn_temperature true
schedules {temperature=[[0,1.0],[2.5,4]]}
training.epochs 3
training.batch_size 8
training.accumulate 2
training.optimizer sgd
training.learning_rate 0.1
training.momentum 0.8
training.weight_decay 0
training.schedule step
training.warmup 0.5
training.clip 1
training.amp bfloat16
training.ema 0.99
training.label_smoothing 0.1
training.patience 2
training.nonfinite skip
training.checkpoint_every 10
training.keep 1
training.log_every 1
training.device cpu
training.threads 2
""".strip().splitlines()
)
# What another option must be, for it to be allowed.
WITH = {
    "teacher.cache": {"augment.crop": "0"},
    "teacher.cache_top_k": {"augment.crop": "0", "teacher.cache": "float32"},
    "data.folder": {"data.name": "folder"},
    "data.size": {"data.name": "folder"},
    "data.channels": {"data.name": "folder"},
    "loss.temperature_reduction": {"loss.temperature": "[1,2]"},
    "loss.agreement_reduction": {"loss.agreement": "0.1"},
} | {
    f"loss.{name}": {"loss.divergence": divergence, "loss.distill_ignored": "false"}
    for name, divergence in [
        ("beta", "jsd"),
        ("skew", "skew_forward_kl"),
        ("divergence_alpha", "alpha"),
        ("dkd_alpha", "dkd"),
        ("dkd_beta", "dkd"),
        ("nkd_gamma", "nkd"),
        ("wsld_alpha", "wsld"),
        ("dist_beta", "dist"),
        ("dist_gamma", "dist"),
    ]
}


@pytest.fixture
def train(monkeypatch):
    """``kdkernels train`` up to the configuration that it would train."""
    found = []
    monkeypatch.setattr(cli, "_train", lambda given: found.append(cli._configuration(given)))

    def run(*argv):
        assert main(["train", *argv]) == 0
        return found.pop()

    return run


def file(folder, text):
    path = folder / "given.toml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
    return path


def refused(changes, *texts, path=None):
    with pytest.raises(SetupError) as error:
        config.load(path, changes)
    for text in texts:
        assert text in str(error.value)
    assert error.value.exit_code == 2


def option_of(configuration, name):
    for part in name.split("."):
        is_table = isinstance(configuration, dict)
        configuration = configuration[part] if is_table else getattr(configuration, part)
    return configuration


def test_defaults_are_valid_and_need_no_file():
    assert config.load() == Config() == config.checked({})


def test_every_option_is_tried_here():
    assert set(GIVEN) == set(config.options())


@pytest.mark.parametrize("name", GIVEN)
def test_the_command_line_takes_every_option(train, name):
    given = {name: GIVEN[name], **WITH.get(name, {})}
    got = train(*(word for key, text in given.items() for word in (f"--{key}", text)))
    value, expected = option_of(got, name), config.parse(GIVEN[name], config.options()[name][0])
    if not isinstance(expected, (list, dict)):
        assert value == expected
    elif name not in ("teacher.others", "schedules"):  # which are more than what was given
        assert type(value) is type(expected)
        assert value == expected
    assert name.startswith("loss.") or value != option_of(Config(), name)


@pytest.mark.parametrize("name", GIVEN)
def test_what_the_command_line_took_is_written_and_read_again(name, tmp_path):
    types = config.options()
    given = {name: GIVEN[name], **WITH.get(name, {})}
    got = config.load(None, {key: config.parse(text, types[key][0]) for key, text in given.items()})
    assert config.load(file(tmp_path, config.dumps(got))) == got


def test_help_lists_every_option_with_its_default(capsys):
    with pytest.raises(SystemExit, match=r"^0$"):
        main(["train", "--help"])
    words = " ".join(capsys.readouterr().out.split())
    for name, (_, text) in config.options().items():
        assert f"--{name} " in words, name
        # What does not fit is broken at hyphens too.
        assert text.replace(" ", "")[-20:] in words.replace(" ", ""), text


@pytest.mark.parametrize("form", ["--training.epochs 3", "--training.epochs=3"])
def test_the_command_line_overrides_the_file(train, tmp_path, form):
    path = file(tmp_path, "[training]\nepochs = 9\nclip = 2.0\n[loss]\nalpha = 0.2\n")
    got = train("--config", str(path), *form.split(), "--loss.alpha", "0.7")
    assert (got.training.epochs, got.training.clip, got.loss) == (3, 2.0, {"alpha": 0.7})


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--baselines"], True),
        (["--baselines", "false"], False),
        (["--baselines", "no"], False),
        (["--baselines=1"], True),
    ],
)
def test_a_switch_needs_no_value(train, argv, expected):
    assert train(*argv).baselines is expected


@pytest.mark.parametrize("section", ["student", "teacher"])
def test_another_model_has_none_of_the_options_of_the_default_one(section):
    """timm:resnet18 does not take stem_stride, and weights of a resnet20 are not made for it."""
    usual = {"stem_stride": 2}
    for changes, expected in [
        ({}, usual),
        ({"weights": "w.safetensors"}, usual),
        ({"name": "timm:resnet18"}, {}),
        ({"name": "resnet20", "options": "{width=8}"}, {"width": 8}),
    ]:
        given = config.load(
            None,
            {
                f"{section}.{key}": config.parse(value, dict) if key == "options" else value
                for key, value in changes.items()
            },
        )
        assert getattr(given, section).options == expected
        assert config.checked(given.model_dump()) == given


def test_changes_leave_the_rest_of_a_section_alone():
    changed = config.load(None, {"training.epochs": "4", "loss.temperature": 2})
    expected = Config(training={"epochs": 4}, loss={"temperature": 2})
    assert changed == expected
    assert changed.training.learning_rate == Config().training.learning_rate


AWKWARD = [
    {"loss": {"divergence": {"forward_kl": 1.0, "jsd": 0.25}, "temperature": [1.0, 2.0]}},
    {"loss": {"weight": [0.5, 1, 2.0], "logit_scale": [1.0, 2.0], "teacher_weights": [1, 3]}},
    {
        "schedules": {"temperature": [[0, 8.0], [1.5, 4.0], [3, 1]], "hint_weight": [[0, 0.0]]},
        "distill": {"hints": {"a": "b"}},
    },
    {"distill": {"hints": {"stages.0.*": "stages.1", 'a "b"': "ü\\n"}, "learn_temperature": True}},
    {"teacher": {"others": [{"name": "a:b", "options": {"x": [{"y": {}}, [], [[1], ["b"]]]}}]}},
    {"teacher": {"others": [{"name": "a:b"}, {"name": "c:d", "weights": "w.pt"}]}},
    {"student": {"options": {"a.b": {"c d": {"": 1}}, "": "\x00\t\r\n\"'\\\x7f€😀"}}},
    {"student": {"options": {"large": 2**63, "tiny": 5e-324, "minus": -0.0, "none": math.inf}}},
    {"wandb": "", "data": {"mean": [0.1, -1.0, 1e-300], "std": [1, 2, 3]}},
]


@pytest.mark.parametrize("given", AWKWARD, ids=str)
def test_toml_in_and_out_is_the_same(given, tmp_path):
    first = config.load(None, given)
    text = config.dumps(first)
    again = config.load(file(tmp_path, text))
    assert again == first
    assert config.dumps(again) == text


def test_the_resolved_configuration_has_every_option(tmp_path):
    text = config.dumps(Config())
    for name in config.options():
        if not name.startswith("loss."):
            assert re.search(rf"^(\[?)({re.escape(name)}\]|{name.split('.')[-1]} =)", text, re.M)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"traning.epochs": 3}, "unknown option traning; did you mean training?"),
        ({"seed": 3}, "unknown option seed; did you mean seeds?"),
        ({"training.epoch": 3}, "unknown option training.epoch; did you mean training.epochs?"),
        ({"data.labeled": 3}, "unknown option data.labeled; did you mean data.labelled?"),
        ({"student.freezes": []}, "did you mean student.freeze?"),
        ({"teacher.others": [{"name": "a", "nam": 1}]}, "unknown option teacher.others.0.nam"),
        ({"loss.temprature": 3}, "temprature is unknown; did you mean temperature?"),
        ({"schedules.temprature": [[0, 1]]}, "schedules.temprature is unknown; did you mean temp"),
        ({"schedules.learning_rate": [[0, 1]]}, "schedules.learning_rate is unknown"),
        ({"zzzz": 3}, "unknown option zzzz"),
        ({"a.b.c": 3}, "unknown option a"),
        ({"student.options.width": 3}, "option student.options.width; did you mean student.opt"),
    ],
)
def test_unknown_keys_are_refused_with_the_nearest(changes, text):
    refused(changes, text)


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["--training.epoch", "3"], "unknown option --training.epoch; did you mean --training.ep"),
        (["--trainng.epochs=3"], "unknown option --trainng.epochs; did you mean --training.epochs"),
        (["--los.alpha", "1"], "did you mean --loss.alpha?"),
        (["--confg", "x"], "did you mean --config?"),
        (["--train", "3"], "unknown option --train"),  # an abbreviation
        (["word"], "unknown option word"),
        (["-x"], "unknown option -x"),
    ],
)
def test_unknown_words_on_the_command_line_are_refused_with_the_nearest(argv, text, capsys):
    assert main(["train", *argv]) == 2
    assert text in capsys.readouterr().err


def test_all_that_is_wrong_is_said_at_once():
    wrong = {"seeds": 0, "training.epochs": "x", "data.nme": 1, "loss.alpha": 2}
    refused(wrong, "seeds", "training.epochs", "got 'x'", "data.nme", "alpha must be in [0, 1]")


@pytest.mark.parametrize(
    ("name", "allowed", "refused_values"),
    [
        ("seeds", [1, 2**31 - 1], [0, -1, 2**31, 1.5, "x", [], {}, math.nan]),
        ("first_seed", [0], [-1, 2**31]),
        ("data.validation", [0, 0.5], [-0.1, 1.1, math.nan, math.inf]),
        ("data.name", ["digits"], ["mnist", "", 3]),
        ("data.channels", [0], [2, 4, -1]),
        ("augment.crop", [0, 256], [-1, 257]),
        ("data.mean", [[0.0, -2.0]], [0.1, ["x"], [math.nan]]),
        ("data.std", [[0.1]], [[0.0], [-1.0], [math.inf]]),
        ("augment.crop", [0, 4], [-1, 0.5]),
        ("augment.flip", [0, 1], [-0.01, 1.01]),
        ("augment.rotation", [0, 180], [-1, 181]),
        ("augment.randaugment", [0, 29], [-1, 30]),
        ("augment.mixup", [0, 10.0], [-1, math.inf]),
        ("student.name", ["x"], [3, None]),
        ("student.options", [{}, {"a": 1}], [[], "x"]),
        ("student.freeze", [[], ["a"]], ["a", [1]]),
        ("teacher.others", [[]], [["a"], [{}], {"name": "a"}]),
        ("teacher.learning_rate", [1e-9], [0, -1]),
        ("distill.hints", [{"a": "b"}], [{"a": 1}, [["a", "b"]], "a"]),
        ("distill.hint_weight", [0], [-1]),
        ("schedules", [{}], [{"alpha": [[0]]}, {"alpha": 0.5}, {"alpha": [[-1, 0.5]]}, []]),
        ("training.epochs", [1, "7"], [0, "", "1.5", None]),
        ("training.ema", [0, 0.999], [1, -0.1]),
        ("training.momentum", [0, 1], [1.5]),
        ("training.optimizer", ["sgd", "adam", "adamw"], ["SGD", ""]),
        ("training.learning_rate", [1e-9, "0.1"], [0, -1, math.inf, "fast"]),
        ("training.keep", [1], [0]),
        ("training.threads", [0, 1024], [-1, 1025]),
        ("training", [{}], [[], 3, "x", {"x": 1}]),
        ("loss", [{}], [[], 3, "x", {"x": 1}]),
    ],
)
def test_limits(name, allowed, refused_values):
    for value in allowed:
        config.load(None, {name: value})
    for value in refused_values:
        refused({name: value})


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"data.validation": 0.5, "data.test": 0.5}, "leave nothing to train on"),
        ({"schedules.alpha": []}, "schedules.alpha: epochs must increase"),
        ({"schedules.alpha": [[1, 0.1], [1, 0.2]]}, "schedules.alpha: epochs must increase"),
        ({"schedules.alpha": [[2, 0.1], [1, 0.2]]}, "schedules.alpha: epochs must increase"),
        ({"schedules.alpha": [[0, 0.1], [1, 2]]}, "schedules.alpha: alpha must be in [0, 1]"),
        ({"schedules.weight": [[0, 1]]}, "schedules.weight: weight must be a Tensor"),
        ({"schedules.beta": [[0, 0.1]]}, "schedules.beta: beta is for divergence 'jsd'"),
        ({"schedules.hint_weight": [[0, -1]]}, "hint_weight: values must not be negative"),
        ({"schedules.z_loss": [[0, -1]]}, "schedules.z_loss: "),
        (
            {"schedules.temperature": [[0, 1]], "distill.learn_temperature": True},
            "either learned or scheduled",
        ),
        ({"teacher.cache": "float32"}, "teacher.cache needs images that stay as they are"),
        *[
            (
                {"teacher.cache": "float32", "augment.crop": 0, f"augment.{name}": 1},
                "teacher.cache needs images that stay as they are",
            )
            for name in ("flip", "rotation", "color", "randaugment", "mixup", "cutmix", "fgsm")
        ],
        *[
            (
                {"teacher.cache": "float16", "augment.crop": 0, f"distill.{name}": {"a": "b"}},
                "teacher.cache is of one teacher's logits",
            )
            for name in ("hints", "attention")
        ],
        (
            {
                "teacher.cache": "float16",
                "augment.crop": 0,
                "teacher.others": [{"name": "resnet8"}],
            },
            "teacher.cache is of one teacher's logits",
        ),
        ({"schedules.hint_weight": [[0, 1]]}, "need the hints or the attention"),
        ({"schedules.attention_weight": [[0, 1]]}, "need the hints or the attention"),
        ({"training.warmup": 8}, "training.warmup must be less than the epochs"),
        (
            {"training.warmup": 2, "teacher.epochs": 2},
            "training.warmup must be less than the epochs",
        ),
        ({"teacher.cache_top_k": 3}, "teacher.cache_top_k needs teacher.cache"),
        ({"data.size": 32}, "data.folder, size and channels need data.name=folder"),
        ({"data.channels": 3}, "data.folder, size and channels need data.name=folder"),
        ({"data.folder": "x"}, "data.folder, size and channels need data.name=folder"),
        (
            {"distill.learn_temperature": True, "loss.temperature": [2, 3]},
            "a temperature that is learned starts from one number",
        ),
    ],
    ids=str,
)
def test_parts_that_do_not_agree_are_refused(changes, text):
    refused(changes, text)


@pytest.mark.parametrize(
    "changes",
    [
        {"data.validation": 0.5, "data.test": 0.49},
        {"teacher.cache": "float16", "augment.crop": 0, "augment.fgsm_share": 1},
        {"schedules.beta": [[0, 0.1]], "loss.divergence": "jsd"},
        {"schedules.attention_weight": [[0, 0], [0.5, 3]], "distill.attention": {"a": "b"}},
        {"training.epochs": 3, "training.warmup": 2.9},
        {"schedules.temperature": [[0, 1]]},
        {"schedules.alpha": [[0, 1]], "distill.learn_temperature": True},
    ],
    ids=str,
)
def test_parts_that_agree_are_taken(changes):
    config.load(None, changes)


@pytest.mark.parametrize(
    "options",
    [
        {"alpha": 1.5},
        {"alpha": "much"},
        {"temperature": 0},
        {"temperature": []},
        {"temperature": True},
        {"divergence": "kl"},
        {"divergence": {"kl": 1.0}},
        {"divergence": {}},
        {"beta": 0.3},
        {"divergence": "jsd", "beta": 1.5},
        {"label_smoothing": 1.1},
        {"backend": "tpu"},
        {"distill_ignored": "True"},
        {"ensemble": "mean"},
        {"teacher_weights": [0, 0]},
        {"teacher_weights": ["a"]},
        {"logit_scale": 0},
        {"num_classes": 1.5},
        {"z_loss": -1},
    ],
    ids=str,
)
def test_what_the_loss_refuses_is_refused_in_its_words(options):
    with pytest.raises((TypeError, ValueError)) as own:
        FusedKDLoss(**options)
    refused({f"loss.{name}": value for name, value in options.items()}, f"loss: {own.value}")


@pytest.mark.parametrize("weight", [["a"], [[1, 2]], [[1], [1, 2]], [10**400], "a", 1, {}])
def test_class_weights_are_a_list_of_numbers(weight):
    refused({"loss.weight": weight}, "loss: ")


@pytest.mark.parametrize(
    "name",
    ["reduction", "return_terms", "inplace", "group", "shift", "vocab_parallel", "ignore_index"],
)
def test_a_loss_option_that_is_the_trainers_own_is_refused_by_name(name, capsys):
    refused({f"loss.{name}": 1}, f"loss: {name} is the trainer's own")
    assert f"loss.{name}" not in config.options()
    assert main(["train", f"--loss.{name}", "1"]) == 2
    assert f"unknown option --loss.{name}" in capsys.readouterr().err


def test_images_without_a_label_are_distilled_unless_told_otherwise():
    assert config.make_loss({}).distill_ignored is True
    assert config.make_loss({"distill_ignored": False}).distill_ignored is False
    assert config.make_loss({"weight": [1, 2]}).weight.tolist() == [1.0, 2.0]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a = ", "is not TOML"),
        ("seeds = 1\nseeds = 2", "is not TOML"),
        (b"\xff\xfe", "is not TOML"),
        ("x = " + "[" * 5000, "is not TOML"),
        ("seeds = 0x" + "f" * 5000, "TOML"),
        ("seeds = " + "9" * 5000, "is not TOML"),
        ("a." * 3000 + "b = 1", ""),
        ("seeds = 1979-05-27", "seeds: "),
        ("loss = 3", "loss: "),
    ],
    ids=lambda text: str(text[:12]),
)
def test_a_file_that_is_wrong_is_refused(tmp_path, text, says):
    refused({}, says, path=file(tmp_path, text))


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    missing = tmp_path / "missing.toml"
    refused({}, f"{missing} cannot be read: No such file", path=missing)
    refused({}, f"{tmp_path} cannot be read: ", path=tmp_path)


@pytest.mark.parametrize(
    "value", [None, {"a": None}, [object()], {1: 2}, "\ud800", 1 << 20000, {"a": {0: 1}}], ids=type
)
def test_what_toml_cannot_say_is_refused(value):
    refused({"student.options": {"a": value}}, "TOML")


def test_a_value_cannot_be_a_section():
    refused({"seeds": 3, "seeds.first": 1}, "seeds must be a table, got 3")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("4", 4),
        ("0.5", 0.5),
        ("jsd", "jsd"),
        ("true", True),
        ("[1, 2]", [1, 2]),
        ("{a = 1}", {"a": 1}),
        ("[1, 2", "[1, 2"),
        ("[" * 5000, "[" * 5000),
        ("", ""),
    ],
    ids=lambda text: str(text)[:10],
)
def test_an_option_of_the_loss_is_read_as_toml(text, value):
    assert config.parse(text, config.options()["loss.taid"][0]) == value


def test_text_of_other_options_stays_text():
    assert config.load(None, {"wandb": config.parse("4", str)}).wandb == "4"


NAMES = [*config.options(), *Config.model_fields]
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([2**31, 2**63, -(2**70), 10**400])
    | st.just(20000).map(lambda bits: 1 << bits)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["\ud800", "jsd", "cosine", "1e999", "nan", "3", "true", "[", "résumé", ""])
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text(max_size=5) | st.sampled_from(NAMES), inner, max_size=3)
    ),
    max_leaves=6,
)
KEYS = (
    st.sampled_from(NAMES)
    | st.sampled_from(NAMES).map(lambda name: name + ".x.y")
    | st.text(alphabet="ab.é\ud800", max_size=6)
    | st.sampled_from(["", ".", "...", "loss.", ".loss", "schedules.alpha", "schedules.beta"])
)
LITERALS = st.sampled_from(
    ["1", "-1", "0", "0.5", "nan", "inf", "true", "'x'", "''", '"\\u00e9"', "[]", "[[0,1],[1,2]]",
     "{}", "{a=1}", "{a={b=[]}}", "1979-05-27", "0xff", "99999999999999999999", "[", "}", '"""']
)  # fmt: skip
LINES = st.one_of(
    st.builds("{} = {}".format, st.sampled_from(NAMES) | st.text(max_size=4), LITERALS),
    st.builds("[{}]".format, st.sampled_from([*Config.model_fields, "a", "a.b", ""])),
    st.text(max_size=10),
)
GOOD = [(name, config.parse(text, config.options()[name][0])) for name, text in GIVEN.items()]
CHANGES = st.lists(st.sampled_from(GOOD) | st.tuples(KEYS, VALUES), max_size=3).map(dict)
FILES = st.none() | st.binary(max_size=30) | st.lists(LINES, max_size=5).map("\n".join)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(text=FILES, changes=CHANGES)
def test_whatever_is_given_is_a_configuration_or_refused(tmp_path_factory, text, changes):
    path = None if text is None else file(tmp_path_factory.getbasetemp(), text)
    try:
        found = config.load(path, changes)
    except SetupError:
        return
    written = config.dumps(found)
    again = config.load(file(tmp_path_factory.getbasetemp(), written))
    assert config.dumps(again) == written
    if "nan" not in written:  # which is nothing's equal
        assert again == found


WORDS = (
    st.sampled_from(
        ["--config", "--out", "--resume", "--seeds", "--seeds=0", "--loss.alpha", "--loss.weight",
         "--baselines", "--x", "-x", "--", "-", "", "-1", "[", "[" * 3000, "nan", "{a=", "\udcff",
         "--training.epochs", "--data.mean", "--training.epochs=a", "missing", "=", "--=", "--seed"]
    )
    | st.text(max_size=6).filter(lambda text: not text.startswith("-h"))
)  # fmt: skip


@settings(max_examples=100, deadline=None, derandomize=True)
@given(words=st.lists(WORDS, max_size=5))
def test_a_command_line_that_is_wrong_ends_with_2_and_in_words(words):
    with pytest.MonkeyPatch.context() as patch:
        said = []
        patch.setattr("sys.stderr", type("Err", (), {"write": said.append, "flush": print})())
        patch.setattr(cli, "Experiment", None)
        try:
            code = main(["train", *words, "--config", "missing.toml"])
        except SystemExit as error:
            code = error.code
    text = "".join(map(str, said))
    assert code == 2, (code, text)
    assert "kdkernels train: error: " in text
    assert "Traceback" not in text
