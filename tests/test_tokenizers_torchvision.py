"""Tokens of torchvision's networks equal what its own feature extraction gives, bit for bit."""

import copy
import urllib.error

import pytest
import torch
from torchvision import models
from torchvision.models.feature_extraction import create_feature_extractor

from tests.tokenizer_laws import check_laws, encode, one_image, spec
from vlm import tokenizers
from vlm.pixels import from_torchvision
from vlm.tokenizers.torchvision import (
    LAST_LAYER,
    TorchvisionConfig,
    TorchvisionTokenizer,
    build,
    load,
)

FEW_INITS = {"init_weights": False}
"""GoogLeNet's and Inception's own random weights are slow to draw, and all but dead."""
NETWORKS = {
    # name: (arguments, pixels, torchvision's node of the last map, grid)
    "alexnet": ({}, (96, 160), "features", (2, 4)),
    "convnext_tiny": ({}, (64, 96), "features", (2, 3)),
    "densenet121": ({}, (64, 96), "relu", (2, 3)),
    "efficientnet_b0": ({}, (64, 96), "features", (2, 3)),
    "googlenet": (FEW_INITS, (64, 96), "inception5b", (2, 3)),
    "inception_v3": (FEW_INITS | {"transform_input": True}, (107, 139), "Mixed_7c", (2, 3)),
    "mnasnet0_5": ({}, (64, 96), "layers", (2, 3)),
    "mobilenet_v2": ({}, (64, 96), "features", (2, 3)),
    "mobilenet_v3_small": ({}, (64, 96), "features", (2, 3)),
    "regnet_y_400mf": ({}, (64, 96), "trunk_output", (2, 3)),
    "resnet18": ({}, (64, 96), "layer4", (2, 3)),
    "shufflenet_v2_x0_5": ({}, (64, 96), "conv5", (2, 3)),
    "squeezenet1_1": ({}, (64, 96), "features", (3, 5)),
    "swin_v2_t": ({}, (64, 96), "permute", (2, 3)),
    "vgg11": ({}, (64, 96), "features", (2, 3)),
}


def wrapped(network, size_hw, *, name, prefix="drop", model_args=None):
    """The tokenizer of a network that torchvision's own constructor made."""
    options = {"name": name, "model_args": model_args or {}, "prefix": prefix}
    return TorchvisionTokenizer(copy.deepcopy(network), spec(*size_hw), **options)


def tiny_vit(image_size=64):
    torch.manual_seed(0)
    sizes = {"num_layers": 2, "num_heads": 2, "hidden_dim": 16, "mlp_dim": 32}
    return models.VisionTransformer(image_size=image_size, patch_size=16, **sizes).eval()


def tiny_maxvit(side):
    torch.manual_seed(0)
    sizes = {"stem_channels": 8, "partition_size": 2, "head_dim": 8, "stochastic_depth_prob": 0.0}
    return models.MaxVit(
        input_size=(side, side), block_channels=[8, 16], block_layers=[1, 1], **sizes
    ).eval()


def extracts(network, node):
    """Torchvision's own extractor of what `node` gives."""
    return create_feature_extractor(network, {node: "map"}, suppress_diff_warning=True)


def check_equals_its_extractor(network, node, tokenizer):
    """Bit for bit, and row by row."""
    extractor = extracts(copy.deepcopy(network), node)
    pixels = torch.randn(2, 3, *tokenizer.pixel_spec.size_hw)
    with torch.no_grad():
        ours, theirs = tokenizer.eval()(pixels), extractor.eval()(pixels)["map"]
    assert ours.grid_hw == tuple(theirs.shape[-2:])
    assert torch.equal(ours.tokens, theirs.flatten(2).transpose(1, 2))
    assert ours.tokens.std() > 0
    h, w = ours.grid_hw
    assert torch.equal(ours.tokens[1, (h - 1) * w + 1], theirs[1, :, h - 1, 1])


def test_every_classification_network_has_its_last_layer():
    builders = map(models.get_model_builder, models.list_models(module=models))
    classes = {builder.__annotations__["return"] for builder in builders}
    assert classes == {*LAST_LAYER, models.VisionTransformer}


@pytest.mark.parametrize("name", NETWORKS)
def test_torchvision_tokens_equal_its_feature_extractor(name):
    arguments, size_hw, node, grid_hw = NETWORKS[name]
    network = models.get_model(name, **arguments)
    tokenizer = wrapped(network, size_hw, name=name, model_args=arguments)
    assert tokenizer.shapes_for((50, 50))[0].grid_hw == grid_hw
    check_equals_its_extractor(network, node, tokenizer)


def test_maxvit_tokens_equal_its_feature_extractor():
    """On square pixels: torchvision's grid attention fails on others."""
    network = tiny_maxvit(64)
    tokenizer = wrapped(network, (64, 64), name="maxvit_t")
    assert tokenizer.shapes_for((9, 9))[0] == (64, (8, 8))
    check_equals_its_extractor(network, "blocks.1", tokenizer)


@pytest.mark.parametrize("prefix", ["keep", "drop"])
def test_vision_transformer_tokens_equal_its_feature_extractor(prefix):
    network = tiny_vit()
    for parameter in network.parameters():  # positions are small, the class token 0
        parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    tokenizer = wrapped(network, (64, 64), name="vit_b_16", prefix=prefix)
    pixels = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        ours = tokenizer(pixels)
        theirs = extracts(network, "encoder.ln")(pixels)["map"]
    assert ours.grid_hw == (4, 4)
    assert ours.shape.prefix == (prefix == "keep")
    assert torch.equal(ours.tokens, theirs if prefix == "keep" else theirs[:, 1:])
    assert [*tokenizer.parts()] == [
        "embed",
        "blocks.encoder_layer_0",
        "blocks.encoder_layer_1",
        "norm",
    ]


@pytest.mark.parametrize("name", ["alexnet", "densenet121", "googlenet", "resnet18"])
def test_torchvision_tokenizer_keeps_the_laws_on_non_square_pixels(name):
    """Counts, parts, rebuilding and gradients, where rows and columns differ."""
    arguments, size_hw, _, _ = NETWORKS[name]
    options = {"name": name, "model_args": arguments, "prefix": "drop"}
    check_laws(build(TorchvisionConfig(pixel_spec=spec(*size_hw), **options)))


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_new_networks_are_made_without_auxiliary_classifiers(name):
    """And without torchvision's warning that initial weights will change."""
    config = {"name": name, "model_args": {}, "prefix": "drop"}
    tokenizer = build(TorchvisionConfig(pixel_spec=spec(107, 107), **config))
    assert not [key for key in tokenizer.state_dict() if "aux" in key.lower()]


@pytest.mark.parametrize("name", ["vit_b_16", "maxvit_t"])
def test_networks_of_one_size_refuse_others_of_as_many_patches(name):
    network = tiny_vit(64) if name == "vit_b_16" else tiny_maxvit(64)
    tokenizer = wrapped(network, (64, 64), name=name)
    with pytest.raises(ValueError, match=r"made for \(64, 64\) pixels, found \(32, 128\)"):
        tokenizer(torch.zeros(1, 3, 32, 128))
    with pytest.raises(ValueError, match="image_size of a vision transformer"):
        wrapped(network, (32, 128), name=name)


def test_images_too_small_for_a_network_are_refused_when_it_is_made():
    with pytest.raises(ValueError, match=r"alexnet cannot take images of \(16, 16\) pixels: "):
        wrapped(models.AlexNet(), (16, 16), name="alexnet")


@pytest.mark.parametrize("name", ["resnet_50", "fcn_resnet50", "r3d_18", "fasterrcnn_resnet50_fpn"])
def test_names_that_are_no_classification_network_are_refused(name):
    with pytest.raises(ValueError, match=f"no classification network '{name}'"):
        TorchvisionConfig(name=name, model_args={}, prefix="drop", pixel_spec=spec(64, 64))
    with pytest.raises(ValueError, match=f"no classification network '{name}'"):
        load(f"{name}:DEFAULT", prefix="drop")


def test_networks_of_other_classes_are_refused():
    with pytest.raises(ValueError, match=r"network of AlexNet, .*found Linear"):
        wrapped(torch.nn.Linear(2, 2), (64, 64), name="resnet18")


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """Puts random weights where torchvision looks for those it has fetched."""

    def put(name, weights):
        torch.manual_seed(1)
        network = models.get_model(name, **(FEW_INITS if name == "googlenet" else {})).eval()
        folder = tmp_path / "hub" / "checkpoints"
        folder.mkdir(parents=True)
        url = models.get_model_weights(name)[weights].url
        torch.save(network.state_dict(), folder / url.rpartition("/")[2])
        return network

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    return put


def test_load_takes_weights_and_preprocessing_by_name(cached):
    reference = cached("mobilenet_v3_small", "IMAGENET1K_V1")
    weights = models.get_model_weights("mobilenet_v3_small").IMAGENET1K_V1
    tokenizer = tokenizers.load("torchvision:mobilenet_v3_small:DEFAULT", prefix="drop")
    image = one_image(240, 310)
    pixels = weights.transforms()(image)[None]
    (ours,) = encode(tokenizer, image)
    with torch.no_grad():
        theirs = reference.features(pixels)
    torch.testing.assert_close(tokenizer.pixel_spec(image)[0], pixels[0], rtol=0, atol=1e-6)
    torch.testing.assert_close(ours.tokens, theirs.flatten(2).transpose(1, 2), rtol=0, atol=1e-4)
    rebuilt = tokenizers.build(tokenizers.config_to_dict(tokenizer))
    rebuilt.load_state_dict(tokenizer.state_dict(), strict=True)
    assert torch.equal(encode(rebuilt, image)[0].tokens, ours.tokens)
    wide = load("mobilenet_v3_small:IMAGENET1K_V1", prefix="drop", size_hw=(64, 96))
    assert wide.shapes_for((9, 9))[0].grid_hw == (2, 3)


def test_load_keeps_what_the_weights_ask_of_the_network(cached):
    """GoogLeNet's weights are of TensorFlow: pixels are normalised anew inside the network."""
    reference = cached("googlenet", "IMAGENET1K_V1")
    reference.transform_input = True
    tokenizer = load("googlenet:IMAGENET1K_V1", prefix="drop", size_hw=(64, 96))
    rebuilt = tokenizers.build(tokenizers.config_to_dict(tokenizer)).eval()
    rebuilt.load_state_dict(tokenizer.state_dict(), strict=True)
    pixels = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        theirs = extracts(reference, "inception5b")(pixels)["map"]
        assert torch.equal(rebuilt(pixels).tokens, theirs.flatten(2).transpose(1, 2))


def test_load_without_weights_says_how_to_go_offline(tmp_path, monkeypatch):
    def no_network(*args, **kwargs):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    with pytest.raises(OSError, match=r"load 'alexnet:DEFAULT'.*Without a network: put https"):
        load("alexnet:DEFAULT", prefix="drop")


@pytest.mark.parametrize("id", ["resnet50", "resnet50:IMAGENET1K_V3"])
def test_load_names_the_weights_that_there_are(id):
    with pytest.raises(ValueError, match="of resnet50 are IMAGENET1K_V1, IMAGENET1K_V2, DEFAULT"):
        load(id, prefix="drop")


@pytest.mark.parametrize("name", ["resnet50", "vit_b_16", "vgg16", "swin_v2_t", "googlenet"])
def test_preprocessing_equals_torchvision_on_non_square_images(name):
    """All weights of the network; some of VGG's keep grey levels of 255, with rounding to match."""
    image = one_image(251, 333)
    for weights in models.get_model_weights(name):
        transforms = weights.transforms()
        (view,) = from_torchvision(transforms)(image)
        torch.testing.assert_close(
            view, transforms(image), rtol=1e-6, atol=1e-6 / min(transforms.std) / 4
        )


def test_preprocessing_of_other_tasks_is_refused_by_field():
    transforms = models.detection.FasterRCNN_ResNet50_FPN_Weights.DEFAULT.transforms()
    with pytest.raises(ValueError, match="expected torchvision's ImageClassification, without"):
        from_torchvision(transforms)
