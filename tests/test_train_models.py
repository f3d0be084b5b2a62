"""Models of the trainer: built in, of libraries, of one's own; their weights and their modules."""

import pickle
import re
import sys
import types

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from kdkernels.train.errors import SetupError
from kdkernels.train.models import MODELS, build, load_weights, matching

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}


def refused(*texts):
    return pytest.raises(SetupError, match="(?s)" + ".*".join(map(re.escape, map(str, texts))))


def model(classes=10, channels=1, **options):
    torch.manual_seed(0)
    return build("resnet8", classes, channels, {"width": 4, **options})


@pytest.fixture(scope="module")
def hf():
    import transformers

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield transformers


@pytest.fixture(scope="module")
def checkpoint(hf, tmp_path_factory):
    """A model of Transformers, and the folder that it was saved in."""
    made = build("hf:resnet", 3, 1, TINY).eval()
    folder = tmp_path_factory.mktemp("checkpoint")
    made.model.save_pretrained(folder)
    return made, folder


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("channels", "side", "classes"), [(1, 28, 10), (3, 32, 7)])
def test_every_model_gives_logits_and_a_gradient_to_every_parameter(name, channels, side, classes):
    torch.manual_seed(0)
    made = build(name, classes, channels, {})
    logits = made(torch.rand(2, channels, side, side))
    assert logits.shape == (2, classes)
    (logits * torch.rand(2, classes)).sum().backward()
    for path, parameter in made.named_parameters():
        assert parameter.grad.isfinite().all(), path
        assert parameter.grad.any(), path


@pytest.mark.parametrize("name", ["resnet8", "mobilenet1", "shufflenet_x0.5"])
@pytest.mark.parametrize("shape", [(8, 8), (28, 28), (9, 40)])
def test_images_may_have_any_size(name, shape):
    assert build(name, 5, 1, {"stem_stride": 2})(torch.rand(4, 1, *shape)).shape == (4, 5)


@pytest.mark.parametrize(
    ("name", "layers"), [("resnet8", 8), ("resnet20", 20), ("resnet110", 110), ("mobilenet3", 20)]
)
def test_a_model_is_as_deep_as_its_name_says(name, layers):
    with torch.device("meta"):
        made = build(name, 10, 3, {})
    shortcuts = sum("shortcut" in path for path, m in made.named_modules() if type(m) is nn.Conv2d)
    found = sum(isinstance(m, (nn.Conv2d, nn.Linear)) for m in made.modules()) - shortcuts
    assert found == layers


def test_the_same_seed_makes_the_same_model():
    first, again = model().state_dict(), model().state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("resnet9", "no model 'resnet9'; did you mean resnet8?"),
        ("mobilnet1", "did you mean mobilenet1?"),
        ("zzz", "no model 'zzz' (built in: resnet8, "),
        ("", "no model ''"),
        ("timm:", "no model 'timm:'"),
        ("hf:", "no model 'hf:'"),
    ],
)
def test_an_unknown_model_is_refused_with_the_nearest_and_all_there_are(name, text):
    with refused(text) as error:
        build(name, 10, 1, {})
    for known in MODELS:
        assert known in str(error.value)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("resnet8", {"wdth": 3}),
        ("resnet8", {"width": "a"}),
        ("resnet8", {"width": -1}),
        ("resnet8", {"width": 0}),
        ("resnet8", {"stem_stride": 0}),
        ("resnet8", {"depth": 14}),
        ("resnet8", {"dropout": 1.5}),
        ("resnet8", {"dropout": "a"}),
        ("resnet8x4", {"width": 8}),
        ("mobilenet1", {"first": 8}),
        ("shufflenet_x0.5", {"width": 8}),
        ("shufflenet_x0.5", {"stem_stride": "a"}),
    ],
)
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_options_that_a_model_does_not_take_are_refused_by_its_name(name, options):
    with refused(f"model {name} with {options} cannot be made: "):
        build(name, 10, 1, options)


def test_options_change_a_model():
    assert model(stem_stride=2)(torch.rand(2, 1, 8, 8)).shape == (2, 10)
    assert model(width=6).stem[0].weight.shape == (6, 1, 3, 3)
    assert model(stem_stride=2).stem(torch.rand(2, 1, 28, 28)).shape == (2, 4, 14, 14)
    given = {"width": 4}
    build("resnet8", 10, 1, given)
    assert given == {"width": 4}


def test_dropout_drops_while_training_only():
    images = torch.rand(4, 1, 8, 8)
    with_, without = model(dropout=0.5), model()
    assert torch.equal(with_.eval()(images), without.eval()(images))
    assert torch.equal(with_(images), with_(images))
    without.train()
    with_.train()
    first, second = with_(images), with_(images)
    assert not torch.equal(first, second)
    assert torch.equal(without(images), without(images))
    model(dropout=1.0).train()(images)


def test_a_model_of_transformers_from_its_configuration(hf):
    made = build("hf:resnet", 3, 1, TINY)
    logits = made(torch.rand(2, 1, 28, 28))
    assert type(logits) is torch.Tensor
    assert logits.shape == (2, 3)
    logits.sum().backward()
    assert all(p.grad is not None for p in made.parameters())
    other = build("hf:mobilenet_v2", 4, 3, {"depth_multiplier": 0.1})
    assert other.eval()(torch.rand(1, 3, 32, 32)).shape == (1, 4)


@pytest.mark.parametrize(
    ("name", "options", "texts"),
    [
        ("hf:resnot", {}, ["is called resnot; did you mean resnet?"]),
        ("hf:./missing", {}, ["no folder and no model of Transformers is called ./missing"]),
        ("hf:bert", {}, ["model hf:bert with {} cannot be made: "]),
        ("hf:resnet", {"depth": [1]}, ["model hf:resnet takes no depth; did you mean depths?"]),
        ("hf:resnet", {"depths": "a"}, ["model hf:resnet with ", " cannot be made: "]),
        ("hf:resnet", {"layer_type": "x"}, ["model hf:resnet with ", " cannot be made: "]),
    ],
)
def test_what_transformers_does_not_have_is_refused(hf, name, options, texts):
    with refused(*texts):
        build(name, 3, 1, options)


def test_a_folder_of_transformers_gives_the_same_logits(checkpoint):
    made, folder = checkpoint
    images = torch.rand(2, 1, 28, 28)
    again = build(f"hf:{folder}", 3, 1, {}).eval()
    assert torch.equal(again(images), made(images))
    assert again(images).shape == (2, 3)


@pytest.mark.parametrize(
    ("classes", "channels", "text"),
    [
        (4, 1, "classifier.1.weight is (3, 16) and (4, 16) in the model"),
        (3, 3, "embedder.convolution.weight is (8, 1, 7, 7) and (8, 3, 7, 7) in the model"),
    ],
)
def test_a_folder_of_another_shape_is_refused_by_the_layers(checkpoint, classes, channels, text):
    _, folder = checkpoint
    with refused(f"{folder} does not fit the model: ", text, "ignore_mismatched_sizes = true"):
        build(f"hf:{folder}", classes, channels, {})
    anew = build(f"hf:{folder}", classes, channels, {"ignore_mismatched_sizes": True})
    assert anew(torch.rand(2, channels, 28, 28)).shape == (2, classes)


@pytest.mark.parametrize("content", ["nothing", "no weights", "a torch file", "broken"])
def test_a_folder_without_a_checkpoint_in_safetensors_is_refused(checkpoint, tmp_path, content):
    made, folder = checkpoint
    if content != "nothing":
        (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    if content == "a torch file":
        torch.save(made.model.state_dict(), tmp_path / "pytorch_model.bin")
    if content == "broken":
        weights = (folder / "model.safetensors").read_bytes()
        (tmp_path / "model.safetensors").write_bytes(weights[:-10])
    with refused(f"model hf:{tmp_path} with {{}} cannot be made: "):
        build(f"hf:{tmp_path}", 3, 1, {})


@pytest.mark.parametrize(("kind", "module"), [("timm:resnet18", "timm"), ("hf:resnet", "hf")])
def test_a_missing_library_is_named_with_the_command_that_installs_it(monkeypatch, kind, module):
    library = {"timm": "timm", "hf": "transformers"}[module]
    monkeypatch.setitem(sys.modules, library, None)
    with refused(f"{library} is not installed", f"pip install 'kdkernels[{module}]'"):
        build(kind, 10, 1, {})


def test_timm_is_told_classes_channels_and_options(monkeypatch):
    told = {}

    def create_model(name, **options):
        told.update(options, name=name)
        return nn.Identity()

    monkeypatch.setitem(sys.modules, "timm", types.SimpleNamespace(create_model=create_model))
    build("timm:resnet18", 10, 1, {"drop_rate": 0.1})
    assert told == {"name": "resnet18", "num_classes": 10, "in_chans": 1, "drop_rate": 0.1}


@pytest.fixture
def own(monkeypatch):
    def make(classes, channels, width=2):
        return nn.Sequential(nn.Conv2d(channels, width, 1), nn.Flatten(), nn.LazyLinear(classes))

    module = types.ModuleType("own_package.models")
    module.make = make
    module.number = 3
    monkeypatch.setitem(sys.modules, "own_package", types.ModuleType("own_package"))
    monkeypatch.setitem(sys.modules, "own_package.models", module)


@pytest.mark.parametrize("options", [{}, {"width": 5}])
def test_a_function_of_ones_own_makes_a_model(own, options):
    made = build("own_package.models:make", 6, 3, options)
    assert made(torch.rand(2, 3, 4, 4)).shape == (2, 6)
    assert made[0].out_channels == options.get("width", 2)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("own_package.models:mak", {}),
        ("own_package.missing:make", {}),
        ("no_such_package:make", {}),
        (":make", {}),
        ("own_package.models:number", {}),
        ("own_package.models:make", {"depth": 1}),
    ],
)
def test_what_is_no_function_of_ones_own_is_refused(own, name, options):
    with refused(f"model {name} with {options} cannot be made: "):
        build(name, 6, 3, options)


def save(content, path):
    if path.suffix == ".safetensors":
        save_file(content, path)
    else:
        torch.save(content, path)
    return path


FILES = ["w.safetensors", "w.pt", "w.pth", "weights"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("as_text", [True, False])
def test_weights_are_loaded_from_both_kinds_of_files(tmp_path, name, as_text):
    first = model()
    images = torch.rand(3, 1, 8, 8)
    first(images)  # moves the statistics of batch norm
    path = save(first.state_dict(), tmp_path / name)
    second = build("resnet8", 10, 1, {"width": 4})
    assert not torch.equal(second.eval()(images), first.eval()(images))
    load_weights(second, str(path) if as_text else path)
    assert torch.equal(second(images), first(images))


def test_weights_of_a_checkpoint_that_calls_them_state_dict_are_loaded(tmp_path):
    first, second = model(), build("resnet8", 10, 1, {"width": 4})
    load_weights(second, save({"state_dict": first.state_dict(), "epoch": 3}, tmp_path / "w.pt"))
    assert torch.equal(second.head.weight, first.head.weight)


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt"])
def test_another_number_of_classes_is_named_by_layer_with_both_shapes(tmp_path, name):
    path = save(model(classes=3).state_dict(), tmp_path / name)
    with refused(f"{path} does not fit", "head.bias is (3,) and (10,) in the model",
                 "head.weight is (3, 16) and (10, 16) in the model"):  # fmt: skip
        load_weights(model(), path)


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt"])
def test_names_that_are_missing_or_left_over_are_named(tmp_path, name):
    weights = model().state_dict()
    weights["extra"] = weights.pop("head.bias")
    with refused("extra is not in the model; head.bias is missing"):
        load_weights(model(), save(weights, tmp_path / name))


def test_of_many_names_that_do_not_fit_five_are_shown_and_nothing_is_loaded(tmp_path):
    path = save({"module." + k: v + 1 for k, v in model().state_dict().items()}, tmp_path / "w.pt")
    target = model()
    n = len(target.state_dict())
    with refused(f"; and {2 * n - 5} more") as error:
        load_weights(target, path)
    assert str(error.value).count(";") == 5
    assert all(torch.equal(v, target.state_dict()[k]) for k, v in model().state_dict().items())


class Command:
    def __reduce__(self):
        return exec, ("import builtins; builtins.executed = True",)


@pytest.mark.parametrize("protocol", ["torch", "pickle"])
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_file_with_other_things_than_tensors_is_refused_and_nothing_is_executed(
    tmp_path, protocol
):
    import builtins

    content = {**model().state_dict(), "x": Command()}
    path = tmp_path / "w.pt"
    if protocol == "torch":
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content))
    with refused(f"{path} is broken, or holds more than tensors"):
        load_weights(model(), path)
    assert not hasattr(builtins, "executed")


@pytest.mark.parametrize(
    "content",
    [[1], torch.ones(3), {"x": 3}, {"state_dict": 3}, {"state_dict": {"x": "y"}}, None, "text"],
    ids=lambda content: type(content).__name__,
)
def test_a_file_of_something_else_is_refused(tmp_path, content):
    path = save(content, tmp_path / "w.pt")
    with refused(f"{path} holds something else than tensors by their names"):
        load_weights(model(), path)


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt"])
@pytest.mark.parametrize("share", [0.0, 0.001, 0.1, 0.5, 0.9, 0.999])
def test_a_truncated_file_is_refused(tmp_path, name, share):
    path = save(model().state_dict(), tmp_path / name)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with refused(path):
        load_weights(model(), path)


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt"])
@pytest.mark.parametrize("kind", ["missing", "folder", "text"])
def test_what_is_no_file_of_weights_is_named(tmp_path, name, kind):
    path = tmp_path / name
    if kind == "folder":
        path.mkdir()
    if kind == "text":
        path.write_text("no weights at all, but some text")
    with refused(path):
        load_weights(model(), path)


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (["stem"], ["stem"]),
        (["head", "stem"], ["head", "stem"]),
        (["stages.*"], ["stages.0", "stages.1", "stages.2"]),
        (["stages.1.*"], ["stages.1.0"]),
        (["stages.*.0"], ["stages.0.0", "stages.1.0", "stages.2.0"]),
        (["stages.*.*.body"], [f"stages.{i}.0.body" for i in range(3)]),
        (["*"], ["stem", "stages", "pool", "head"]),
        (["st*"], ["stem", "stages"]),
        (["*.2"], ["stem.2", "stages.2", "pool.2"]),
        ([], []),
    ],
    ids=str,
)
def test_a_star_stands_for_exactly_one_name(patterns, expected):
    assert matching(model(), patterns) == expected


@pytest.mark.parametrize(
    ("pattern", "text"),
    [
        ("heads", "no module 'heads' in the model; did you mean head?"),
        ("stages.7", "no module 'stages.7' in the model; did you mean stages."),
        ("stages..0", "no module 'stages..0'"),
        ("s.em", "no module 's.em' in the model; did you mean stem?"),
        ("stem|head", "no module"),
        ("st", "no module 'st'"),
        ("stem.*.*", "no module 'stem.*.*'"),
        ("", "no module ''"),
        ("[", "no module '['"),
    ],
)
def test_a_pattern_that_matches_nothing_is_refused_with_the_nearest(pattern, text):
    with refused(text):
        matching(model(), ["stem", pattern])
