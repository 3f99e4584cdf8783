import json

import pytest
import torch
import transformers

from tests import encoder_decoders as law
from tests import tiny
from tests.tiny import image
from vlm import systems
from vlm.data.example import caption_example
from vlm.families.decoder_only.batch import collate
from vlm.families.encoder_decoder import generate as transcribe
from vlm.losses.token import token_losses
from vlm.systems.compose_encoder_decoder import DecoderSizes, build
from vlm.vocabulary import ids_of

SIZES = DecoderSizes(width=32, depth=2, heads=4, mlp_width=48, length=40)
VIT = dict(hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=2,
           image_size=32, patch_size=8)  # fmt: skip


@pytest.fixture(scope="module")
def vision(tmp_path_factory):
    """The folder of a tiny vision transformer, as transformers writes it."""
    folder = tmp_path_factory.mktemp("vit")
    torch.manual_seed(0)
    transformers.ViTModel(transformers.ViTConfig(**VIT), add_pooling_layer=False).save_pretrained(
        folder
    )
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return f"transformers:{folder}"


def text_tokenizer(**special):
    """Bytes with a start token of their own, as a decoder from scratch wants."""
    tokenizer = tiny.text_tokenizer(special=("<s>",))
    tokenizer.bos_token = special.get("bos_token", "<s>")
    return tokenizer


def bert_folder(folder, head=True, **more):
    """A tiny encoder of texts with its tokenizer."""
    torch.manual_seed(0)
    values = law.SIZES | law.POSITIONS | law.IDS | more
    kind = transformers.BertForMaskedLM if head else transformers.BertModel
    model = kind(transformers.BertConfig(**values))
    if not head:
        model.pooler = None
    model.save_pretrained(folder)
    tokenizer = tiny.text_tokenizer(special=("[CLS]",))
    tokenizer.cls_token, tokenizer.sep_token = "[CLS]", "<|im_end|>"
    tokenizer.eos_token = None
    tokenizer.save_pretrained(folder)
    return str(folder), model


def batch_of(model, texts=("ab", "a longer one")):
    rows = [
        model.processor.encode(caption_example(f"r{i}", image(i), text, ""))
        for i, text in enumerate(texts)
    ]
    return collate(rows, model.processor.pad_id)


def write(model, new=12):
    processor = model.processor
    groups = collate([processor.encode_image(image(i)) for i in range(3)], 0).groups
    return transcribe.greedy(
        model.module, groups, processor.start_ids, model.end_ids, processor.pad_id, new
    )


@pytest.mark.parametrize("adaptor", ["linear", "mlp", "resampler"])
@torch.no_grad()
def test_model_from_scratch_is_itself_after_saving(vision, tmp_path, adaptor):
    model = build(vision=vision, text=SIZES, text_tokenizer=text_tokenizer(), adaptor=adaptor)
    assert model.processor.start_ids == (259,)
    assert (model.end_ids, model.processor.pad_id, model.processor.max_tokens) == ((258,), 256, 40)
    model.save(tmp_path, "native")
    again = systems.load(tmp_path, "cpu", "float32")
    assert again.processor.pixel_spec == model.processor.pixel_spec
    assert again.max_new_tokens == model.max_new_tokens == 39
    batch, other = batch_of(model), batch_of(again)
    assert torch.equal(batch.ids, other.ids)
    assert torch.equal(model.module(batch), again.module(other))
    assert write(again) == write(model)
    with pytest.raises(ValueError, match="came from no published system"):
        model.save(tmp_path / "out", "reference")


@torch.no_grad()
def test_seed_decides_fresh_weights_and_leaves_the_global_generator(vision):
    def made(seed):
        return build(vision=vision, text=SIZES, text_tokenizer=text_tokenizer(), seed=seed)

    state = torch.get_rng_state()
    first, same, other = (made(seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    batch = batch_of(first)
    assert torch.equal(first.module(batch), same.module(batch))
    assert not torch.allclose(first.module(batch), other.module(batch))


@pytest.mark.parametrize("head", [True, False])
@torch.no_grad()
def test_decoder_begins_from_a_pretrained_encoder_of_texts(vision, tmp_path, head):
    """The lecture's way: its own weights are kept, cross-attention is fresh."""
    folder, bert = bert_folder(tmp_path / "bert", head)
    model = build(vision=vision, text=folder, adaptor="linear")
    assert model.processor.start_ids == (259,)
    assert model.end_ids == (258,)
    kept = model.module.text.state_dict()
    for key, tensor in bert.state_dict().items():
        assert torch.equal(kept[key if head else f"bert.{key}"], tensor), key
    assert any("crossattention" in key for key in kept)
    batch = batch_of(model)
    losses = token_losses(model.module(batch), batch.targets)
    assert losses.isfinite().all()
    model.save(tmp_path / "saved", "native")
    again = systems.load(tmp_path / "saved", "cpu", "float32")
    assert torch.equal(again.module(batch), model.module(batch))


def test_pretrained_decoder_refuses_what_does_not_fit(vision, tmp_path):
    folder, _ = bert_folder(tmp_path / "bert", vocab_size=259)
    with pytest.raises(ValueError, match=r"at most 259 ids, the rows of .* found 260"):
        build(vision=vision, text=folder)
    tiny.text_model().save_pretrained(tmp_path / "llama")
    with pytest.raises(ValueError, match="LlamaForCausalLM has no cross-attention"):
        build(vision=vision, text=str(tmp_path / "llama"), text_tokenizer=text_tokenizer())
    with pytest.raises(OSError, match="expected a folder or hub id of a text model"):
        build(vision=vision, text=str(tmp_path), text_tokenizer=text_tokenizer())
    with pytest.raises(ValueError, match="a decoder from scratch needs one, found None"):
        build(vision=vision, text=SIZES)
    with pytest.raises(ValueError, match="5 heads do not divide the width 32"):
        DecoderSizes(width=32, depth=1, heads=5, mlp_width=8, length=8)


def test_pad_that_is_the_end_is_scored_and_ends_writing(vision):
    """Training rows keep their ends, and what is written still stops."""
    tokenizer = text_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    model = build(vision=vision, text=SIZES, text_tokenizer=tokenizer, adaptor="linear")
    assert model.processor.pad_id == model.end_ids[0] == 258
    batch = batch_of(model)
    assert batch.scored.sum(1).tolist() == [3, 13]
    model.module.train()
    optimizer = torch.optim.Adam(model.module.parameters(), lr=1e-2)
    for _ in range(30):
        loss = token_losses(model.module(batch), batch.targets).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.module.eval()
    groups = batch.groups
    found = transcribe.greedy(model.module, groups, (259,), (258,), 258, 20)
    assert [model.processor.decode(ids) for ids, _ in found] == ["ab", "a longer one"]
    assert [ids[-1] for ids, _ in found] == [258, 258]


def test_native_folder_of_another_version_or_with_unknown_keys_is_refused(vision, tmp_path):
    model = build(vision=vision, text=SIZES, text_tokenizer=text_tokenizer())
    model.save(tmp_path, "native")
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | {"version": 9}))
    with pytest.raises(ValueError, match="written as version 9, this vlm reads 1"):
        systems.load(tmp_path)
    path.write_text(json.dumps(values | {"surplus": 1}))
    with pytest.raises(ValueError, match=r"unknown keys \['surplus'\]"):
        systems.load(tmp_path)


def test_ids_of_a_tokenizer_are_its_own():
    """Bos and eos, or BERT's cls and sep; without a start, the end."""
    tokenizer = text_tokenizer()
    assert ids_of(tokenizer) == (259, 258, 256)
    tokenizer.bos_token = None
    assert ids_of(tokenizer) == (258, 258, 256)
    tokenizer.pad_token = None
    assert ids_of(tokenizer) == (258, 258, 258)
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="expected an eos or sep token"):
        ids_of(tokenizer)
