"""Position ids of the layout, of one number and of three, in forward passes and in generation."""

import pytest
import torch
from transformers import CONFIG_MAPPING as CONFIGS
from transformers import AutoModelForCausalLM, Qwen2VLConfig, Qwen2VLForConditionalGeneration

from tests import tiny
from vlm import adaptors
from vlm.box_codecs import LocTokens
from vlm.families.decoder_only import generate as engine
from vlm.families.decoder_only.batch import IMAGE, Row, collate, collate_packed
from vlm.families.decoder_only.image_layout import ImageLayout, Span, StreamLayout
from vlm.families.decoder_only.model import DecoderOnlyModel
from vlm.families.decoder_only.module import DecoderOnly
from vlm.systems.compose import add_loc_tokens

IMAGE_ID = 299
STOP = 296
"""An id that ends a row; beams need one."""


def qwen2_vl():
    """Ours on a tiny random Qwen2-VL, whose own image encoder is not used."""
    config = Qwen2VLConfig(
        text_config=dict(
            vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
            bos_token_id=None, eos_token_id=None,
            rope_parameters=dict(rope_type="default", rope_theta=100.0, mrope_section=[1, 1, 2]),
        ),
        vision_config=dict(depth=1, embed_dim=16, hidden_size=32, num_heads=2, patch_size=4),
        image_token_id=IMAGE_ID, video_token_id=298,
    )  # fmt: skip
    torch.manual_seed(0)
    text = Qwen2VLForConditionalGeneration(config).eval()
    with torch.no_grad():  # larger than the usual start, so that greedy ids are varied
        for parameter in text.model.language_model.layers.parameters():
            if parameter.dim() > 1:
                parameter.mul_(8.0)
    adaptor = dict(kind="mlp", in_width=12, out_width=32, depth=2, hidden_width=32)
    return DecoderOnly(tiny.Patches(), adaptors.build(adaptor), text).eval()


def row_of(name, *parts, answer=0, numbers=3):
    """A row of texts, by their number of ids, and images, by their grids; then an answer."""
    generator = torch.Generator().manual_seed(len(name))
    ids, views, images = [], [], []
    for part in (*parts, answer):
        if isinstance(part, int):
            ids += torch.randint(65, 91, (part,), generator=generator).tolist()
            continue
        (h, w), length = part, part[0] * part[1]
        ids += [IMAGE] * length
        pixels = torch.randn(3, 4 * h, 4 * w, generator=generator)
        views.append((pixels, (len(views), 0)))
        span = Span(length=length, grid_hw=part)
        images.append(ImageLayout(pieces=(span,), encoded=length))
    return Row(
        name=name,
        ids=torch.tensor(ids),
        scored=torch.arange(len(ids)) >= len(ids) - answer,
        views=tuple(views),
        layout=StreamLayout(images=tuple(images), position_numbers=numbers),
    )


def rows(answer=0, numbers=3):
    """Two images of unequal grids, text alone, one image first."""
    return [
        row_of("two", 3, (2, 5), 4, (4, 3), 2, answer=answer, numbers=numbers),
        row_of("text", 7, answer=answer, numbers=numbers),
        row_of("first", (6, 2), 1, answer=answer, numbers=numbers),
    ]


def their_arguments(batch, given):
    """A batch as Qwen2-VL takes it. Its grids are those before 2 x 2 patches are merged."""
    grids = [span.grid_hw for row in given for span in row.layout.spans]
    return dict(
        input_ids=batch.ids.masked_fill(batch.ids == IMAGE, IMAGE_ID),
        mm_token_type_ids=(batch.ids == IMAGE).int(),
        image_grid_thw=torch.tensor([[1, 2 * h, 2 * w] for h, w in grids]) if grids else None,
        attention_mask=batch.valid.long(),
    )


def their_positions(module, batch, given):
    """int64[3, B, T], and the next position of each row, int64[B]."""
    positions, delta = module.text.model.get_rope_index(**their_arguments(batch, given))
    return positions, delta[:, 0] + batch.valid.sum(1)


@pytest.mark.parametrize("padding", ["right", "left"])
def test_three_numbers_are_those_of_qwen2_vl(padding):
    module, given = qwen2_vl(), rows(answer=2)
    batch = collate(given, 0, padding)
    theirs, following = their_positions(module, batch, given)
    assert torch.equal(batch.positions, theirs)
    assert torch.equal(batch.positions.amax((0, 2)) + 1, following)
    packed = collate_packed(given).positions
    assert packed.shape == (3, 1, int(batch.valid.sum()))
    assert torch.equal(packed[:, 0], theirs[:, batch.valid])


def test_tokens_without_a_grid_count_as_text():
    spans = (Span(length=7, grid_hw=(2, 3)), Span(length=2, grid_hw=None))
    layout = StreamLayout(images=(ImageLayout(pieces=spans, encoded=9),), position_numbers=3)
    found = layout.positions(torch.tensor([True] * 9 + [False]))
    assert found.tolist() == [
        [0, 1, 1, 1, 1, 1, 1, 4, 5, 6],
        [0, 1, 1, 1, 2, 2, 2, 4, 5, 6],
        [0, 1, 2, 3, 1, 2, 3, 4, 5, 6],
    ]
    with pytest.raises(ValueError, match="expected 9 image positions, as the layout says, found 8"):
        layout.positions(torch.tensor([True] * 8))


def test_rows_of_other_position_numbers_are_refused():
    one, three = row_of("one", 3, numbers=1), row_of("three", 3)
    for make in (lambda given: collate(given, 0), collate_packed):
        with pytest.raises(
            ValueError, match="three: expected position_numbers=1, as one has, found 3"
        ):
            make([one, three])
    model = tiny.decoder_only()
    for batch in (collate([three], 0), collate([three], 0, "left"), collate_packed([three])):
        with pytest.raises(ValueError, match=r"three: .* one number .*LlamaForCausalLM takes"):
            model(batch)
    with pytest.raises(ValueError, match="three: expected one number"):
        engine.generate(model, collate([three], 0, "left"), (), 0)


@torch.no_grad()
def test_logits_are_those_of_qwen2_vl_whatever_the_padding():
    module, given = qwen2_vl(), rows(answer=3)
    batch = collate(given, 0)
    vectors = module.embed(batch.ids, module.encode(batch.groups), batch.names)
    theirs, _ = their_positions(module, batch, given)
    full = module.text(
        inputs_embeds=vectors, attention_mask=batch.valid.long(), position_ids=theirs
    ).logits
    expected = full[:, :-1][batch.scored[:, 1:]]
    plain = module(collate(rows(answer=3, numbers=1), 0))
    assert (plain - expected).abs().max() > 1e-2  # positions are seen
    for made in (batch, collate(given, 0, "left"), collate_packed(given)):
        torch.testing.assert_close(module(made), expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_greedy_ids_are_those_of_qwen2_vl():
    """Beside its own positions of the whole row and its own forward, again for each id; the image
    tokens alone are ours."""
    module, given = qwen2_vl(), rows()
    batch = collate(given, 0, "left")
    written = engine.generate(module, batch, (), 0, max_new_tokens=8)
    vectors = module.embed(batch.ids, module.encode(batch.groups), batch.names)
    arguments, theirs = their_arguments(batch, given), []
    for _ in range(8):
        positions, _ = module.text.model.get_rope_index(**arguments)
        mask = arguments["attention_mask"]
        logits = module.text(
            inputs_embeds=vectors, attention_mask=mask, position_ids=positions, use_cache=False
        ).logits
        new = logits[:, -1].argmax(-1, keepdim=True)
        theirs.append(new)
        vectors = torch.cat([vectors, module.text.get_input_embeddings()(new)], dim=1)
        more = dict(input_ids=new, mm_token_type_ids=new.int() * 0, attention_mask=new * 0 + 1)
        arguments |= {name: torch.cat([arguments[name], more[name]], dim=1) for name in more}
    assert [ids for ids, _ in written] == torch.cat(theirs, dim=1).tolist()
    assert len({tuple(ids) for ids, _ in written}) > 1


@pytest.mark.parametrize("beams", [1, 3])
@torch.no_grad()
def test_written_ids_go_on_at_the_largest_number(beams):
    """The log-probability of each is that of a training row with the same answer, also where the
    prompt ends with an image, whose numbers differ."""
    module = qwen2_vl()
    given = [*rows(), row_of("ends", 2, (3, 5)), row_of("tall", 2, (5, 2))]
    written = engine.generate(
        module, collate(given, 0, "left"), (STOP,), 0, max_new_tokens=5, num_beams=beams
    )
    assert not module.text._forward_pre_hooks
    for row, (ids, logprobs) in zip(given, written, strict=True):
        longer = Row(
            name=row.name,
            ids=torch.cat([row.ids, torch.tensor(ids)]),
            scored=torch.cat([row.scored, torch.ones(len(ids), dtype=torch.bool)]),
            views=row.views,
            layout=row.layout,
        )
        scores = module(collate([longer], 0)).log_softmax(-1)
        expected = scores.gather(1, torch.tensor(ids)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(logprobs), expected, atol=2e-4, rtol=1e-4)


OTHERS = {
    "gpt2": dict(n_embd=32, n_layer=2, n_head=4, n_positions=128),  # learned positions
    "bloom": dict(hidden_size=32, n_layer=2, n_head=4),  # takes no position ids
}


def model_of(kind):
    if kind not in OTHERS:
        return tiny.decoder_only(kind)
    made = tiny.decoder_only()
    torch.manual_seed(0)
    made.text = AutoModelForCausalLM.from_config(CONFIGS[kind](vocab_size=300, **OTHERS[kind]))
    return made.eval()


@pytest.mark.parametrize("kind", ["llama", "gemma3_text", *OTHERS])
@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3}, {"do_sample": True, "temperature": 2.0}], ids=str
)
@torch.no_grad()
def test_ids_are_those_that_transformers_writes_by_the_mask(kind, options):
    """One number: positions counted by the layout are those that it counts, in unequal rows."""
    module, given = model_of(kind), rows(numbers=1)
    batch = collate(given, 0, "left")
    vectors = module.embed(batch.ids, module.encode(batch.groups), batch.names)
    options = {"max_new_tokens": 6, "num_beams": 1, "do_sample": False, **options}
    with engine.seeded(0, vectors.device):
        written = engine.generate(module, batch, (STOP,), 0, **options)
    with engine.seeded(0, vectors.device):
        theirs = module.text.generate(
            inputs_embeds=vectors, attention_mask=batch.valid.long(), eos_token_id=[STOP],
            pad_token_id=0, **options,
        )  # fmt: skip
    for (ids, _), row in zip(written, theirs.tolist(), strict=True):
        assert ids == row[: len(ids)]
        assert set(row[len(ids) :]) <= {0}


def test_every_task_gives_the_language_model_the_positions_of_the_layout():
    """An image of 2 x 3 tokens takes 3 numbers, so that what follows it has 3 fewer."""
    module = qwen2_vl()
    processor = tiny.processor(module, position_numbers=3)
    model = DecoderOnlyModel(module=module, processor=processor, stop_ids=(processor.end_id,))
    add_loc_tokens(model, LocTokens(bins=16))
    given = []
    module.text.register_forward_pre_hook(
        lambda _, args, options: given.append(options["position_ids"]), with_kwargs=True
    )
    image, question = tiny.image(), "what?"
    asked = model.ground_prompt.format(phrase=question)
    content = [{"type": "image", "image": image}, {"type": "text", "text": question}]
    two = {"max_new_tokens": 2, "min_new_tokens": 2}
    tasks = (
        (question, lambda: model.answer([image], [question], **two)),
        (question, lambda: model.chat([{"role": "user", "content": content}], **two)),
        (asked, lambda: model.ground([image], [question], **two)),
    )
    for text, task in tasks:
        given.clear()
        task()
        first, second = given
        prompt = processor.encode_prompt(tiny.example(content=(None, text)).question())
        assert torch.equal(first[:, 0], prompt.positions)
        assert first.amax() == len(prompt.ids) - 3 - 1
        assert second.flatten().tolist() == [len(prompt.ids) - 3] * 3
