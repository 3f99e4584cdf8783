import pytest
import torch
import transformers

from tests.tokenizer_laws import check_laws, check_order, encode, one_image
from tests.transformers_tokenizers import SAM, TINY, tiny
from vlm import tokenizers
from vlm.tokenizers.transformers import build, load

PREFIX = {
    "siglip_vision_model": 0,
    "clip_vision_model": 1,
    "vit": 1,
    "deit": 2,
    "beit": 1,
    "dinov2": 1,
    "dinov2_with_registers": 5,
    "sam_vision_model": 0,
}


@pytest.mark.parametrize("model_type", PREFIX)
@pytest.mark.parametrize("layer_norm", [(-1, True), (-1, False), (-2, False), (1, True)])
def test_transformers_tokenizer_keeps_the_laws_on_non_square_pixels(model_type, layer_norm):
    """Counts, parts, rebuilding and gradients, where rows and columns differ."""
    layer, norm = layer_norm
    check_laws(build(tiny(model_type, (64, 96), layer=layer, norm=norm, prefix="keep")))


@pytest.mark.parametrize("model_type", [name for name in PREFIX if name != "sam_vision_model"])
def test_transformers_tokenizer_keeps_the_laws_with_pooling(model_type):
    check_laws(build(tiny(model_type, (96, 48), pooled=True)))


@pytest.mark.parametrize(
    ("model_type", "image_px", "patch_px", "size_hw", "length"),
    [
        ("siglip_vision_model", 224, 16, (224, 224), 196),
        ("siglip_vision_model", 384, 14, (384, 384), 729),
        ("siglip_vision_model", 384, 14, (384, 196), 378),
        ("clip_vision_model", 224, 16, (224, 224), 197),
        ("clip_vision_model", 224, 16, (96, 800), 301),
        ("deit", 224, 16, (224, 224), 198),
        ("dinov2", 224, 14, (224, 518), 593),
        ("dinov2_with_registers", 224, 14, (384, 224), 437),
    ],
)
def test_transformers_count_equals_output_at_published_geometries(
    model_type, image_px, patch_px, size_hw, length
):
    """Towers with and without a class token; non-square images."""
    more = {"image_size": image_px, "patch_size": patch_px, "num_hidden_layers": 1}
    tokenizer = build(tiny(model_type, size_hw, prefix="keep", **more))
    (tokens,) = encode(tokenizer, one_image(30, 50))
    assert tokenizer.tokens_for((30, 50)) == tokens.tokens.shape[1] == length
    assert tokens.shape.prefix == PREFIX[model_type]


@pytest.mark.parametrize("model_type", PREFIX)
def test_transformers_dropped_prefix_leaves_the_kept_grid(model_type):
    keep = build(tiny(model_type, (64, 96), prefix="keep"))
    drop = build(tiny(model_type, (64, 96), prefix="drop"))
    drop.load_state_dict(keep.state_dict())
    ((kept,), (dropped,)) = (encode(tokenizer, one_image(60, 90)) for tokenizer in (keep, drop))
    assert kept.shape.prefix == PREFIX[model_type]
    assert dropped.shape.prefix == 0
    assert dropped.grid_hw == (4, 6)
    assert torch.equal(kept.tokens[:, PREFIX[model_type] :], dropped.tokens)


@pytest.mark.parametrize("model_type", PREFIX)
def test_transformers_tokens_follow_rows_then_columns(model_type):
    tokenizer = build(tiny(model_type, (64, 96), layer=0, norm=False)).eval()
    check_order(tokenizer)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"layer": -5}, "layer -5 asked of an encoder with 3 blocks"),
        ({"layer": -2, "pooled": True}, "pooled needs all 3 blocks"),
        ({"norm": False, "pooled": True}, "needs norm=True"),
        ({"prefix": "auto"}, "prefix must be 'drop' or 'keep', found 'auto'"),
        ({"model_type": "swin"}, "'swin' is not one of siglip_vision_model"),
        ({"model_type": "sam_vision_model", "pooled": True}, "which has no pooling"),
        ({"model_type": "cvt", "depth": [1, 2, 3], "layer": 0}, "nothing before its first stage"),
        ({"model_type": "cvt", "depth": [1, 2, 3], "layer": 4}, "an encoder with 3 blocks"),
        ({"model_type": "timesformer", "pooled": True}, "which has no pooling"),
    ],
)
def test_transformers_config_raises_when_the_encoder_cannot(change, words):
    with pytest.raises(ValueError, match=words):
        tiny(**{"model_type": "siglip_vision_model"} | change)


def test_transformers_positions_of_a_non_square_table_refuse_other_sizes():
    tokenizer = build(tiny("vit", (32, 64), image_size=[32, 64]))
    assert tokenizer.tokens_for((10, 10)) == 8
    with pytest.raises(ValueError, match=r"made for \(32, 64\) pixels are not square"):
        tokenizer(torch.zeros(1, 3, 64, 64))


@pytest.mark.parametrize("model_type", ["siglip", "clip", "vit", "dinov2", "sam"])
def test_transformers_load_reads_a_saved_folder(model_type, tmp_path):
    reference, processor = saved(model_type, tmp_path)
    pooled = model_type != "sam"
    tokenizer = load(str(tmp_path), prefix="keep", norm=model_type != "clip", pooled=pooled)
    inputs = processor(one_image(40, 70), return_tensors="pt")
    with torch.no_grad():
        output = reference(**inputs)
    (tokens,) = encode(tokenizer, one_image(40, 70))
    expected = output.last_hidden_state
    if model_type == "sam":
        expected = expected.flatten(2).transpose(1, 2)
    torch.testing.assert_close(tokens.tokens, expected, rtol=0, atol=1e-5)
    if pooled:
        torch.testing.assert_close(tokens.pooled, output.pooler_output, rtol=0, atol=1e-5)
    values = tokenizers.config_to_dict(tokenizer)
    tokenizers.build(values).load_state_dict(tokenizer.state_dict(), strict=True)


def saved(model_type, folder):
    """A tiny whole model and its image processor in `folder`; returns its vision encoder too."""
    torch.manual_seed(0)
    size = {"height": 64, "width": 64}
    text = {key: TINY[key] for key in TINY if key not in ("image_size", "patch_size")}
    text |= {"vocab_size": 99, "max_position_embeddings": 8}
    if model_type == "siglip":
        config = transformers.SiglipConfig(text_config=text, vision_config=TINY)
        model, processor = transformers.SiglipModel(config), transformers.SiglipImageProcessor
        encoder, processor = model.vision_model, processor(size=size)
    elif model_type == "clip":
        config = transformers.CLIPConfig(text_config=text, vision_config=TINY)
        model, edge = transformers.CLIPModel(config), {"shortest_edge": 64}
        encoder = model.vision_model
        processor = transformers.CLIPImageProcessor(size=edge, crop_size=size)
    elif model_type == "sam":
        config = transformers.SamConfig(vision_config=TINY | SAM | {"intermediate_size": 32})
        encoder = model = transformers.SamVisionModel(config.vision_config)
        torch.nn.init.normal_(model.vision_encoder.pos_embed)
        processor = transformers.SamImageProcessor(size={"longest_edge": 64}, pad_size=size)
    else:
        name = {"vit": "ViT", "dinov2": "Dinov2"}[model_type]
        config = getattr(transformers, f"{name}Config")(**TINY)
        encoder = model = getattr(transformers, f"{name}Model")(config)
        processor = transformers.ViTImageProcessor(size=size)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return encoder.eval(), processor


def test_transformers_load_names_the_weights_that_the_folder_lacks(tmp_path):
    transformers.ViTModel(transformers.ViTConfig(**TINY), add_pooling_layer=False).save_pretrained(
        tmp_path
    )
    transformers.ViTImageProcessor(size={"height": 64, "width": 64}).save_pretrained(tmp_path)
    load(str(tmp_path), prefix="drop", norm=True, pooled=False)
    with pytest.raises(ValueError, match=r"lacks these weights.*pooler\.dense\.bias"):
        load(str(tmp_path), prefix="drop", norm=True, pooled=True)


def test_transformers_load_without_weights_says_how_to_go_offline(tmp_path):
    with pytest.raises(OSError, match=r"cannot load '.*nothing here'.*Without a network"):
        load(str(tmp_path / "nothing here"), prefix="drop", norm=True, pooled=False)
