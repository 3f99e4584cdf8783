"""Idefics2 beside transformers' classes: pixels, ids, logits, training, answers."""

from dataclasses import replace

import pytest
import torch
import transformers
from PIL import Image

import vlm
from tests.reference import images_in_text as law
from tests.reference import tiny_idefics2
from tests.reference.images_in_text import close, our_logits, reopened, with_marks
from tests.reference.tiny_idefics2 import (
    END,
    FENCE,
    IMAGE_TOKENS,
    KINDS,
    MARK,
    PATCH,
    ROWS,
    SIZES,
    examples,
    their_inputs,
    write_folder,
)
from tests.tiny import image as one_image
from vlm.data.example import Example, Turn
from vlm.families.decoder_only.batch import IMAGE, collate
from vlm.pixels import BadImage, from_transformers
from vlm.systems import idefics2
from vlm.tokenizers.bucketed import bucketed_positions

folder = law.folders(KINDS, write_folder)
KEY_MAP = idefics2.key_map_of(2)


def test_idefics2_pixels_and_ids_match_reference(folder):
    """Images that are not square, small, large and narrow: each view has its own size, and
    transformers' its pixels before the padding."""
    model, (_, processor) = vlm.load(folder, "cpu"), reopened(folder)
    views = 5 if model.processor.pixel_spec.splits else 1
    shapes = set()
    for size_hw in SIZES.values():
        image, prompt = one_image(3, size_hw), f"what is {MARK}? a cat"
        row = model.processor.encode_literal([image], prompt)
        inputs = processor(images=[[image]], text=[prompt], return_tensors="pt")
        assert torch.equal(with_marks(row.ids, model), inputs["input_ids"][0])
        theirs = zip(inputs["pixel_values"][0], inputs["pixel_attention_mask"][0], strict=True)
        for (ours, _), (pixels, real) in zip(row.views, theirs, strict=True):
            H, W = ours.shape[1:]
            assert real[:H, :W].all()
            assert real.sum() == H * W
            close(ours, pixels[:, :H, :W], 1e-6)
            shapes.add((H, W))
        sizes = model.processor.pixel_spec.view_sizes(size_hw)
        assert [tuple(view.shape[1:]) for view, _ in row.views] == list(sizes)
        (layout,) = row.layout.images
        assert [span.length for span in layout.spans] == [IMAGE_TOKENS] * views
    assert any(H % PATCH for H, _ in shapes)
    assert len(shapes) > 4


@pytest.mark.parametrize("name", SIZES)
def test_idefics2_pixels_match_reference_of_the_pil_backend(name):
    reader = transformers.Idefics2ImageProcessorPil(size={"shortest_edge": 20, "longest_edge": 60})
    image = one_image(3, SIZES[name])
    (ours,) = from_transformers(reader)(image)
    close(ours, reader([[image]], return_tensors="pt")["pixel_values"][0, 0], 1e-6)


@pytest.mark.parametrize("answers", [False, True])
def test_idefics2_ids_and_logits_match_reference(folder, answers):
    """In a batch transformers pads the images, whose sizes are not whole patches; alone it does
    not: ours are the same in both."""
    law.check_ids_and_logits(folder, tiny_idefics2, answers)


@torch.no_grad()
@pytest.mark.parametrize("name", SIZES)
def test_idefics2_image_tokens_match_reference_alone_and_padded(name, tmp_path):
    """A lone image, and the same beside a larger one."""
    peer = write_folder(tmp_path, "whole")
    model, processor = vlm.load(tmp_path, "cpu"), reopened(tmp_path)[1]
    image, large = one_image(5, SIZES[name]), one_image(6, (60, 60))
    row = model.processor.encode_literal([image], MARK)
    ours, _ = model.module.encode(collate([row], 0).groups)
    for images in ([[image]], [[image], [large]]):
        inputs = processor.image_processor(images, return_tensors="pt")
        theirs = peer.get_image_features(**inputs).pooler_output[0]
        close(ours, theirs.reshape(ours.shape), 1e-5)


def test_bucketed_positions_are_the_references_at_published_size():
    """On its table of 70 x 70, for every number of patches on one side."""
    vision = idefics2.SIZES["8b"].vision | {"hidden_size": 4, "num_attention_heads": 1}
    model = transformers.Idefics2Model(
        transformers.Idefics2Config(
            vision_config=vision | {"num_hidden_layers": 1, "intermediate_size": 4},
            perceiver_config={"hidden_size": 8, "resampler_depth": 1},
            text_config={"model_type": "mistral", "hidden_size": 8, "intermediate_size": 8,
                         "num_hidden_layers": 1, "num_attention_heads": 1,
                         "num_key_value_heads": 1, "vocab_size": 8, "pad_token_id": 0},
            image_token_id=1,
        )
    )  # fmt: skip
    embeddings, seen = model.vision_model.embeddings, []
    embeddings.position_embedding.register_forward_hook(lambda _, args, __: seen.append(args[0]))
    for count in range(1, 80):
        pixels = torch.zeros(1, 3, 14 * count, 28)
        embeddings(pixels, torch.ones(1, count, 2, dtype=torch.bool))
        assert torch.equal(bucketed_positions((count, 2), 70), seen[-1][0])
        embeddings(pixels.transpose(2, 3), torch.ones(1, 2, count, dtype=torch.bool))
        assert torch.equal(bucketed_positions((2, count), 70), seen[-1][0])


def test_idefics2_loss_and_gradients_match_reference(folder):
    law.check_loss_and_gradients(folder, tiny_idefics2, {"idefics2": KEY_MAP})


@pytest.mark.parametrize("folder", ["whole"], indirect=True)
def test_idefics2_training_step_changes_every_part(folder):
    law.check_every_part_learns(folder, tiny_idefics2)


@pytest.mark.parametrize(("folder", "pack"), [("whole", None), ("split", 400)], indirect=["folder"])
def test_idefics2_trains_by_the_same_loop(folder, tmp_path, pack):
    law.check_trains_by_the_loop(folder, tiny_idefics2, tmp_path, pack)


def test_idefics2_greedy_ids_match_reference_and_batches(folder):
    model, (peer, processor) = vlm.load(folder, "cpu"), reopened(folder)
    together = model.answer_examples(examples(), max_new_tokens=10)
    inputs = their_inputs(processor)
    banned = [[id] for id in model.banned_ids]
    theirs = peer.generate(
        **inputs, max_new_tokens=10, do_sample=False, bad_words_ids=banned,
        eos_token_id=list(model.stop_ids),
    )  # fmt: skip
    theirs = theirs[:, inputs["input_ids"].shape[1] :].tolist()
    assert together == [model.processor.decode(ids) for ids in theirs]
    for number, (images, content, _) in enumerate(ROWS):
        (written,) = model.generate([images], [their_text(model, content)], max_new_tokens=10)
        assert list(written.ids) == theirs[number][: len(written.ids)], content
    assert len(set(together)) > 1


def their_text(model, content):
    """The literal prompt of a question."""
    turn = Turn("user", content)
    return model.processor.chat_template.render((turn,), "row", open_answer=True).replace(
        "\ue5c0", MARK
    )


@torch.no_grad()
def test_idefics2_never_writes_a_mark_of_images(tmp_path):
    """Even where the language model holds nothing else for likely."""
    write_folder(tmp_path)
    model = vlm.load(tmp_path, "cpu")
    tokens = model.processor.text_tokenizer
    assert model.banned_ids == tuple(tokens.convert_tokens_to_ids([MARK, FENCE]))
    images, prompts = [ROWS[0][0]] * 2, [f"{MARK} a", f"{MARK} the"]
    head = model.module.text.lm_head.weight
    before = model.generate(images, prompts, max_new_tokens=3)
    head[list(model.banned_ids)] = 30 * head[before[0].ids[0]]
    after = model.generate(images, prompts, max_new_tokens=3)
    again = model.generate(images, prompts, max_new_tokens=3, suppress_tokens=[after[0].ids[0]])
    assert not {*after[0].ids, *after[1].ids, *again[0].ids} & {*model.banned_ids}
    assert after[0].ids[0] == before[0].ids[0] not in again[0].ids
    with_marks_allowed = replace(model, banned_ids=())
    assert with_marks_allowed.generate(images, prompts, max_new_tokens=1)[0].ids[0] in (
        model.banned_ids
    )


def said_of(processor, ids):
    """A row as text, each run of image tokens as its length."""
    text, run = "", 0
    for id in [*ids.tolist(), None]:
        if id == IMAGE:
            run += 1
            continue
        text += f"[{run}]" * (run > 0)
        text += "" if id is None else processor.text_tokenizer.convert_ids_to_tokens(id)
        run = 0
    return text.replace("▁", " ")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ((None, "a <b>?"), f"User:{FENCE}[*]{FENCE} a <b>?"),
        (("of ", None, " and ", None), f"User: of {FENCE}[*]{FENCE} and {FENCE}[*]{FENCE}"),
        ((None, None, "<b>"), f"User:{FENCE}[*]{FENCE}[*]{FENCE}<b>"),
    ],
)
def test_idefics2_prompt_matches_snapshot(folder, content, expected):
    """One mark between two images that no text parts, a space before a word after a mark."""
    processor = vlm.load(folder, "cpu").processor
    images = tuple(one_image(1, (40, 60)) for part in content if part is None)
    row = processor.encode_prompt(Example("r", (Turn("user", content),), images))
    one = f"[{IMAGE_TOKENS}]"
    splits = processor.pixel_spec.splits
    image = FENCE.join([one] * 5) if splits else one
    text = said_of(processor, row.ids).removeprefix("<s>").removeprefix(" ")
    assert text == expected.replace("[*]", image) + f"{END}\nAssistant:"


@torch.no_grad()
def test_idefics2_counts_image_tokens_by_the_layout_whatever_the_pixels(tmp_path):
    """transformers' class drops views that are zero all over, such as those of a black image where
    nothing is normalised."""
    peer = write_folder(tmp_path, "whole", images={"do_normalize": False})
    model, processor = vlm.load(tmp_path, "cpu"), reopened(tmp_path)[1]
    black, grey, prompt = Image.new("RGB", (45, 31)), tiny_idefics2.GREY, f"{MARK}{MARK} what?"
    batch = collate([model.processor.encode_literal([black, grey], prompt)], 0)
    assert our_logits(model, batch).isfinite().all()
    assert int((batch.ids == IMAGE).sum()) == 2 * IMAGE_TOKENS
    assert [bool(group.pixels.any()) for group in batch.groups] == [False, True]
    inputs = processor(images=[[black, grey]], text=[prompt], return_tensors="pt")
    with pytest.raises(ValueError, match="features and image tokens do not match"):
        peer(**inputs)
    batch = collate([model.processor.encode_literal([grey, grey], prompt)], 0)
    inputs = processor(images=[[grey, grey]], text=[prompt], return_tensors="pt")
    close(our_logits(model, batch), peer(**inputs).logits)


@pytest.mark.parametrize("see", ["encode", "measure"])
def test_idefics2_refuses_an_image_without_quarters(tmp_path, see):
    write_folder(tmp_path, "split")
    processor = vlm.load(tmp_path, "cpu").processor
    turns = (Turn("user", (None, "what?")), Turn("assistant", ("a",)))
    example = Example("thin", turns, (one_image(1, (1, 30)),))
    with pytest.raises(BadImage, match=r"thin: .*at least 2 x 2 pixels.*found 1 x 30"):
        getattr(processor, see)(example)


@pytest.mark.parametrize("folder", ["split"], indirect=True)
def test_idefics2_refuses_more_images_than_marks(folder):
    model = vlm.load(folder, "cpu")
    images = [one_image(1, (40, 60))] * 2
    with pytest.raises(ValueError, match=r"has 1 <image> marks, there are 2 images"):
        model.generate([images], [f"{MARK} what?"])


def test_idefics2_measures_rows_as_it_encodes_them(folder):
    processor = vlm.load(folder, "cpu").processor
    for example in examples():
        row, measured = processor.encode(example), processor.measure(example)
        assert torch.equal(row.ids, measured.ids)
        assert [view.shape for view, _ in row.views] == [view.shape for view, _ in measured.views]


@pytest.mark.parametrize("folder", ["split"], indirect=True)
def test_idefics2_chat_says_what_an_answer_says(folder):
    law.check_chat_says_what_an_answer_says(folder, tiny_idefics2)


@pytest.mark.parametrize("folder", ["whole"], indirect=True)
def test_idefics2_is_listed_and_used_by_commands(folder, tmp_path, capsys):
    law.check_is_listed_and_used_by_commands(folder, tmp_path, capsys, "idefics2")


@pytest.mark.slow
def test_idefics2_has_the_published_number_of_parameters():
    """In millions: language model, its head, SigLIP, MLP and perceiver, all."""
    size = idefics2.SIZES["8b"]
    config = transformers.Idefics2Config(
        vision_config=dict(size.vision),
        perceiver_config=dict(size.perceiver),
        text_config={"model_type": "mistral", **size.text},
    )
    with torch.device("meta"):
        module = idefics2.build("8b")
        peer = transformers.Idefics2ForConditionalGeneration(config)

    def millions(part):
        return round(sum(p.numel() for p in part.parameters()) / 1e6, 1)

    assert millions(module.text.model) == 7110.7
    assert millions(module.tokenizer) == 417.8
    assert millions(module.adaptor) == 743.2
    assert millions(module) == 8402.8
    assert millions(peer) == 8402.8
    shapes = {idefics2.published_name(n, idefics2.key_map_of(3)): p.shape
              for n, p in module.named_parameters()}  # fmt: skip
    assert shapes == {name: p.shape for name, p in peer.named_parameters()}
    assert module.tokenizer.shapes_for((300, 900))[-1].grid_hw == (27, 64)
    assert module.tokenizer.shapes_for((3000, 1000))[-1].grid_hw == (70, 27)
