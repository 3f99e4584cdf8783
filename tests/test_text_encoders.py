import pytest
import torch
import transformers
from transformers import CONFIG_MAPPING

from tests import tiny
from tests.contrastive_models import IDS, SMALL, backbone
from vlm.text import encoders as text_encoders
from vlm.text.encoders import TextEncoder

END = 49


ENCODERS = {
    "clip": lambda: TextEncoder(backbone("clip_text_model"), "end", masked=False, end_id=END),
    "clip, old": lambda: TextEncoder(backbone("clip_text_model"), "largest", masked=False),
    "siglip": lambda: TextEncoder(
        backbone("siglip_text_model", projection_size=10), "own", masked=False
    ),
    "bert": lambda: TextEncoder(backbone("bert"), "class", masked=True),
    "bert, mean": lambda: TextEncoder(backbone("bert"), "mean", masked=True),
    "bert, own": lambda: TextEncoder(backbone("bert"), "own", masked=True),
    "llama": lambda: TextEncoder(
        backbone("llama", num_key_value_heads=1), "last", masked=True
    ),
    "qwen3, mean": lambda: TextEncoder(
        backbone("qwen3", num_key_value_heads=1, head_dim=8), "mean", masked=True
    ),
}  # fmt: skip
SEES_PADS = ("siglip",)


@pytest.fixture(params=ENCODERS)
def encoder(request):
    return ENCODERS[request.param]()


def texts(lengths=(5, 3), T=5, pad=0):
    """Random texts, each with END once, at its last position."""
    ids = torch.randint(3, END, (len(lengths), T), generator=torch.Generator().manual_seed(0))
    valid = torch.arange(T) < torch.tensor(lengths)[:, None]
    for row, length in enumerate(lengths):
        ids[row, length - 1] = END
    return ids.masked_fill(~valid, pad), valid


def test_text_encoder_rebuilds_from_its_configuration(encoder):
    values = text_encoders.config_of(encoder)
    again = text_encoders.build(values).eval()
    again.load_state_dict(encoder.state_dict())
    assert text_encoders.config_of(again) == values
    ids, valid = texts()
    assert again.dim == encoder.dim == encoder(ids, valid).shape[1]
    assert torch.equal(again(ids, valid), encoder(ids, valid))


@pytest.mark.parametrize("name", [name for name in ENCODERS if name not in SEES_PADS])
def test_padding_changes_no_text_in_training_mode(name):
    encoder = ENCODERS[name]().train()
    for module in encoder.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    ids, valid = texts()
    longer = torch.nn.functional.pad(ids, (0, 4), value=0)
    more = torch.nn.functional.pad(valid, (0, 4), value=False)
    alone = torch.cat(
        [encoder(ids[i : i + 1, :n], valid[i : i + 1, :n]) for i, n in ((0, 5), (1, 3))]
    )
    torch.testing.assert_close(encoder(ids, valid), alone, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(encoder(longer, more), alone, atol=1e-5, rtol=1e-4)


def test_pads_are_attended_where_nothing_is_masked():
    encoder = ENCODERS["siglip"]()
    ids, valid = texts()
    other, _ = texts(pad=7)
    assert torch.equal(encoder(ids, valid)[0], encoder(other, valid)[0])
    assert (encoder(ids, valid)[1] - encoder(other, valid)[1]).abs().max() > 1e-3


def test_poolings_take_the_places_they_name():
    model = backbone("bert")
    ids, valid = texts()
    states = model(input_ids=ids, attention_mask=valid.long()).last_hidden_state
    expected = {
        "class": states[:, 0],
        "last": torch.stack([states[0, 4], states[1, 2]]),
        "mean": torch.stack([states[0].mean(0), states[1, :3].mean(0)]),
        "largest": torch.stack([states[0, 4], states[1, 2]]),
    }
    for pooling, vectors in expected.items():
        found = TextEncoder(model, pooling, masked=True)(ids, valid)
        torch.testing.assert_close(found, vectors, msg=pooling)
    states = model(input_ids=ids).last_hidden_state
    found = TextEncoder(model, "last", masked=False)(ids, valid)
    torch.testing.assert_close(found, states[:, -1])


def test_end_pooling_takes_the_first_end_among_equal_pads():
    """CLIP pads with its end token."""
    encoder = ENCODERS["clip"]()
    ids, valid = texts(pad=END)
    short = encoder(ids[1:, :3], valid[1:, :3])
    torch.testing.assert_close(encoder(ids, valid)[1:], short, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", ["clip", "siglip", "bert", "llama"])
def test_every_parameter_gets_a_gradient(name):
    encoder = ENCODERS[name]()
    ids, valid = texts((16, 9), T=16)
    encoder(ids, valid).square().sum().backward()
    idle = [n for n, p in encoder.named_parameters() if p.grad is None]
    assert idle == []


def test_a_decoder_is_loaded_from_a_causal_language_model(tmp_path):
    whole = tiny.text_model("llama")
    whole.save_pretrained(tmp_path)
    encoder = text_encoders.load(tmp_path, "last", masked=True)
    ids, valid = texts()
    with torch.no_grad():
        states = whole.get_decoder()(input_ids=ids).last_hidden_state
        torch.testing.assert_close(encoder(ids, valid)[0], states[0, -1])
    assert not any("lm_head" in name for name, _ in encoder.named_parameters())


def test_a_text_tower_is_loaded_from_a_whole_model(tmp_path):
    config = CONFIG_MAPPING["clip"](
        text_config=dict(vocab_size=50, max_position_embeddings=16, **SMALL, **IDS),
        vision_config=dict(image_size=16, patch_size=8, **SMALL),
    )
    whole = transformers.CLIPModel(config).eval()
    whole.save_pretrained(tmp_path)
    encoder = text_encoders.load(tmp_path, "end", masked=False, end_id=END)
    ids, valid = texts()
    with torch.no_grad():
        expected = whole.text_model(input_ids=ids).last_hidden_state[1, 2]
        torch.testing.assert_close(encoder(ids, valid)[1], expected)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(OSError, match=r"transformers cannot load '.*nothing'.*Without a network"):
        text_encoders.load(str(tmp_path / "nothing"), "mean", masked=True)


@pytest.mark.parametrize(
    ("pooling", "end_id", "message"),
    [
        ("first", None, "'first' is not one of end, largest, last, class, mean, own"),
        ("end", None, "'end' needs an end_id"),
        ("mean", 3, "the others take none; found pooling 'mean' and end_id 3"),
    ],
)
def test_text_encoder_refuses_a_bad_pooling(pooling, end_id, message):
    with pytest.raises(ValueError, match=message):
        TextEncoder(backbone("bert"), pooling, masked=True, end_id=end_id)


def test_own_pooling_of_a_model_that_pools_nothing_is_named():
    encoder = TextEncoder(backbone("llama", num_key_value_heads=1), "own", masked=True)
    with pytest.raises(ValueError, match="LlamaModel pools nothing"):
        encoder(*texts())
