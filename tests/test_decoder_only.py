import dataclasses

import pytest
import torch

from tests import tiny
from vlm.families.decoder_only.batch import IMAGE, collate

KINDS = list(tiny.TEXT_SHAPES)


def rows_of(processor, *examples):
    return [processor.encode(example) for example in examples]


def mixed_examples():
    """Two images interleaved, one image, text alone; unequal lengths."""
    return [
        tiny.example("two", (None, "and ", None, "differ how?"), "in colour"),
        tiny.example("one", (None, "?"), "a dog on a hill"),
        tiny.example("text", ("What is the capital of France?",), "Paris"),
    ]


def full_logits(model, batch):
    """The slow twin: the language model's own forward on the whole stream, mask always given."""
    vectors = model.embed(batch.ids, model.encode(batch.groups), batch.names)
    positions = (batch.valid.long().cumsum(1) - 1).clamp(min=0)
    return model.text(
        inputs_embeds=vectors, attention_mask=batch.valid.long(), position_ids=positions
    ).logits


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("padding", ["right", "left"])
@torch.no_grad()
def test_scored_logits_equal_the_full_forward_of_the_language_model(kind, padding):
    model = tiny.decoder_only(kind)
    processor = tiny.processor(model)
    batch = collate(rows_of(processor, *mixed_examples()), processor.pad_id, padding)
    full = full_logits(model, batch)
    expected = full[:, :-1][batch.scored[:, 1:]]
    torch.testing.assert_close(model(batch), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_padding_on_either_side_changes_no_scored_logit(kind):
    """Each row alone, without padding, equals the same row in a padded batch."""
    model = tiny.decoder_only(kind).train()
    processor = tiny.processor(model)
    rows = rows_of(processor, *mixed_examples())
    alone = torch.cat([model(collate([row], processor.pad_id)) for row in rows])
    for padding in ("right", "left"):
        together = model(collate(rows, processor.pad_id, padding))
        torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_no_padding_lies_inside_a_row():
    """Image and text of a row are one unbroken run, on either side of the padding."""
    model = tiny.decoder_only()
    processor = tiny.processor(model)
    for padding in ("right", "left"):
        batch = collate(rows_of(processor, *mixed_examples()), processor.pad_id, padding)
        changes = (batch.valid[:, 1:] != batch.valid[:, :-1]).sum(1)
        assert (changes <= 1).all()


@torch.no_grad()
def test_image_i_binds_to_position_i():
    """Swapping the two images of one row changes it; swapping them between rows follows them."""
    model = tiny.decoder_only()
    processor = tiny.processor(model)
    a, b = tiny.image(1), tiny.image(2)
    ask = (None, "then", None)
    rows = rows_of(
        processor,
        tiny.example("ab", ask, images=(a, b)),
        tiny.example("ba", ask, images=(b, a)),
    )
    batch = collate(rows, processor.pad_id)
    encoded = model.encode(batch.groups)[0].view(4, 6, -1)
    assert torch.equal(encoded[0], encoded[3])
    assert torch.equal(encoded[1], encoded[2])
    vectors = model.embed(batch.ids, model.encode(batch.groups), batch.names)
    first_image = (batch.ids[0] == IMAGE).nonzero()[:6, 0]
    torch.testing.assert_close(vectors[0, first_image], encoded[0])


@torch.no_grad()
def test_views_of_several_sizes_keep_stream_order():
    """Rows whose images differ in size are grouped by size, then placed in row order."""
    model = tiny.decoder_only()
    small = tiny.processor(model)
    b = small.encode(tiny.example("b"))
    model.tokenizer.pixel_spec = dataclasses.replace(model.tokenizer.pixel_spec, size_hw=(16, 8))
    large = tiny.processor(model)
    rows = [large.encode(tiny.example("a")), b, large.encode(tiny.example("c"))]
    batch = collate(rows, small.pad_id)
    assert len(batch.groups) == 2
    alone = torch.cat([model(collate([row], small.pad_id)) for row in rows])
    torch.testing.assert_close(model(batch), alone, atol=1e-4, rtol=1e-4)


def test_count_mismatch_names_the_row_and_both_numbers():
    model = tiny.decoder_only()
    processor = tiny.processor(model)
    rows = rows_of(processor, *mixed_examples())
    long = dataclasses.replace(
        rows[1],
        ids=torch.cat([rows[1].ids, torch.tensor([IMAGE])]),
        scored=torch.cat([rows[1].scored, torch.tensor([False])]),
    )
    with pytest.raises(ValueError, match="one: 7 image positions in the text, 6 image tokens"):
        model(collate([rows[0], long], processor.pad_id))


def test_frozen_tokenizer_saves_no_activation():
    """Nothing computed before the first trainable parameter is kept for the backward pass."""
    model = tiny.decoder_only()
    model.requires_grad_(False)
    model.adaptor.requires_grad_(True)
    processor = tiny.processor(model)
    batch = collate(rows_of(processor, *mixed_examples()), processor.pad_id)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        images = model.tokenizer(batch.groups[0].pixels)
        assert not saved
        model.adaptor(images)
        assert saved
    model(batch).sum().backward()
    assert all(p.grad is not None for p in model.adaptor.parameters())
    assert all(p.grad is None for p in (*model.text.parameters(), *model.tokenizer.parameters()))


def test_text_only_batch_needs_no_image():
    model = tiny.decoder_only()
    processor = tiny.processor(model)
    batch = collate(rows_of(processor, mixed_examples()[2]), processor.pad_id)
    assert batch.groups == ()
    assert model(batch).shape == (len("Paris") + 1, 300)


def all_logits(model, batch):
    vectors = model.embed(batch.ids, model.encode(batch.groups), batch.names)
    return model.logits(model.read(vectors, batch))


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_later_tokens_change_no_earlier_logit(kind):
    """Causal throughout, image positions included: what is said later is not seen before, what is
    said or shown before is seen later."""
    model = tiny.decoder_only(kind)
    batch = collate([tiny.processor(model).encode(tiny.example(answer="a cat sat"))], 256)
    plain = all_logits(model, batch)
    position = int(batch.scored[0].nonzero()[2])
    ids = batch.ids.clone()
    ids[0, position] = (ids[0, position] + 1) % 256
    later = all_logits(model, dataclasses.replace(batch, ids=ids))
    assert torch.equal(later[:, :position], plain[:, :position])
    assert not torch.allclose(later[:, position], plain[:, position])
    first = int((batch.ids[0] == IMAGE).nonzero()[0])
    groups = tuple(dataclasses.replace(g, pixels=g.pixels.flip(0, -1)) for g in batch.groups)
    shown = all_logits(model, dataclasses.replace(batch, groups=groups))
    assert torch.equal(shown[:, :first], plain[:, :first])
    assert not torch.allclose(shown[:, position], plain[:, position])


def test_one_row_changes_no_logit_of_another():
    """Rows that share a batch, and a forward pass of the image tokenizer, stay apart."""
    model = tiny.decoder_only()
    processor = tiny.processor(model)
    rows = [processor.encode(tiny.example(f"r{i}", images=(tiny.image(i),))) for i in range(2)]
    other = processor.encode(tiny.example("other", images=(tiny.image(7),), answer="a dog ran off"))
    both = all_logits(model, collate(rows, 256))[0]
    beside_another = all_logits(model, collate([rows[0], other], 256))[0]
    length = len(rows[0].ids)
    torch.testing.assert_close(both[:length], beside_another[:length], atol=1e-5, rtol=1e-5)
