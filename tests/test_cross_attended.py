"""Cross-attention towers: what a position sees, what blocks add, and how rows are read together."""

import dataclasses
from contextlib import nullcontext

import pytest
import torch
from transformers import IdeficsConfig, MllamaTextModel
from transformers.models.idefics.modeling_idefics import IdeficsGatedCrossAttentionLayer
from transformers.models.mllama import modeling_mllama
from transformers.models.mllama.configuration_mllama import MllamaTextConfig

from tests import tiny, training
from tests.training import cross_attended_model
from vlm.data.example import Example, Turn
from vlm.families.cross_attended.blocks import GatedBlock, GatedBlockConfig
from vlm.families.cross_attended.memory import Memory, pack_memory, view_of
from vlm.families.cross_attended.module import MEMORY, Cross, CrossAttended, CrossConfig
from vlm.families.decoder_only import generate as engine
from vlm.families.decoder_only.batch import IMAGE, collate, collate_packed
from vlm.image_tokens import ImageTokens
from vlm.training.activation_checkpointing import checkpoint_activations
from vlm.training.memory.simulate import SimulatedStep
from vlm.training.objectives.next_token import NextToken
from vlm.training.sharding import _dummy_batch, _dummy_views, units_of

KINDS = ["llama", "qwen2", "qwen3", "gemma2", "gemma3_text", "mistral", "gpt_neox", "smollm3",
         "phi3", "granite"]  # fmt: skip
WIDTH, TOKENS, TILES = 32, 4, 2


def examples():
    """Text alone; an image in the middle; two apart, and two side by side of unequal shapes."""
    return [
        tiny.example("text", ("What is the capital of France?",), "Paris"),
        tiny.example("middle", ("look at ", None, "please"), "a dog on a hill"),
        tiny.example("apart", (None, "and ", None, "differ how?"), "in colour"),
        tiny.example("together", ("both", None, None), "a", images=(tiny.image(3, (30, 5)),
                                                                    tiny.image(4))),
    ]  # fmt: skip


def rows_for(module):
    return [tiny.processor(module).encode(example) for example in examples()]


def hidden_of(module, batch):
    return module.hidden(module.encode(batch.groups), batch)


def alone(module, row):
    return hidden_of(module, collate([row], 256))[0]


# What a position sees


def test_memory_leaves_out_tokens_that_are_not_valid():
    views = ImageTokens(
        tokens=torch.arange(6.0).view(2, 3, 1),
        grid_hw=None,
        valid=torch.tensor([[True, True, False], [True, False, False]]),
        owner=torch.tensor([[0, 0, 0], [0, 1, 0]]),
    )
    memory = pack_memory([views], examples=2)
    assert memory.tokens[:, 0].tolist() == [0, 1, 3]
    assert (memory.bounds, memory.valid) == (((0, 2, 3), (3,)), None)
    whole = pack_memory([views], examples=2, keep_invalid=True)
    assert whole.bounds == ((0, 3, 6), (6,))
    assert whole.valid.tolist() == [True, True, False, True, False, False]


def test_an_image_of_several_views_is_seen_as_one():
    owner = torch.tensor([[0, 0, 1], [0, 0, 0], [1, 0, 0]])
    groups = [ImageTokens(tokens=torch.ones(3, 2, 1), grid_hw=None, owner=owner)]
    assert pack_memory(groups, examples=2).bounds == ((0, 4), (4, 6))


def test_view_of_a_packed_row_keeps_examples_apart():
    memory = Memory(tokens=torch.zeros(9, 1), bounds=((0, 4), (4,), (4, 9)))
    is_image = torch.tensor([[True, False, False, False, False, True, False]])
    bounds = torch.tensor([0, 2, 4, 7])
    view = view_of(memory, is_image, torch.ones(1, 7).bool(), ["a", "b", "c"], bounds, "all")
    assert [run[:4] for run in view.runs] == [(0, 2, 0, 4), (2, 4, 4, 4), (4, 5, 4, 4),
                                              (5, 7, 4, 9)]  # fmt: skip


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_sees_nothing(side):
    module = tiny.cross_attended()
    batch = collate(rows_for(module), 256, side)
    view = module.view(module.encode(batch.groups), batch)
    for row, valid in zip(view.rows, batch.valid, strict=True):
        assert row[-1].stop == len(valid)
        for run in row:
            if run.first < run.last:
                assert valid[run.start : run.stop].all()


def test_marks_and_images_that_differ_are_named_by_row():
    memory = Memory(tokens=torch.zeros(4, 1), bounds=((0, 4),))
    is_image = torch.tensor([[True, True]])
    with pytest.raises(ValueError, match=r"cats\.png: 2 image marks in the text, 1 images"):
        view_of(memory, is_image, torch.ones(1, 2).bool(), ["cats.png"])


# What blocks add


def of_mllama(gates=0.6):
    """A layer of transformers' Mllama with open gates, and our block with its weights."""
    config = MllamaTextConfig(
        hidden_size=WIDTH, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48,
        num_hidden_layers=2, cross_attention_layers=[0], rms_norm_eps=1e-5, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    layer = MllamaTextModel._from_config(config, attn_implementation="sdpa").layers[0].eval()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.3) if parameter.dim() > 1 else parameter.uniform_(0.5, 1.5)
        layer.cross_attn_attn_gate.fill_(gates)
        layer.cross_attn_mlp_gate.fill_(-gates)
    block = GatedBlock(
        GatedBlockConfig(width=WIDTH, memory_width=WIDTH, heads=4, kv_heads=2, head_width=8,
                         mlp_width=48, eps=1e-5)
    )  # fmt: skip
    names = {
        "input_layernorm": "attention_norm", "cross_attn.": "", "post_attention_layernorm":
        "mlp_norm", "cross_attn_attn_gate": "attention_gate", "cross_attn_mlp_gate": "mlp_gate",
    }  # fmt: skip
    return layer, block, renamed(layer, names)


def renamed(layer, names):
    state = {}
    for name, tensor in layer.state_dict().items():
        for theirs, ours in sorted(names.items(), key=lambda pair: -len(pair[0])):
            if name.startswith(theirs):
                name = ours + name.removeprefix(theirs)
                break
        state[name] = tensor
    return state


@pytest.mark.parametrize("blind", ["nothing", "unmasked"])
@torch.no_grad()
def test_block_equals_mllamas_layer(blind):
    """Two images of one and two real tiles of two. Positions that see an image have what
    transformers gives; others, by its rule, what it gives, and by Meta's exactly what they had."""
    layer, block, state = of_mllama()
    block.load_state_dict(state)
    T, S = 6, 2 * TILES * TOKENS
    hidden, states = torch.randn(1, T, WIDTH), torch.randn(1, S, WIDTH)
    seen = torch.zeros(1, T, 2, TILES)
    seen[:, 1:3, 0, :1] = 1
    seen[:, 3:, 1, :] = 1
    mask, full = modeling_mllama._prepare_cross_attention_mask(seen, TOKENS, torch.float32)
    theirs = layer(
        hidden, cross_attention_states=states, cross_attention_mask=mask,
        attention_mask=None, full_text_row_masked_out_mask=full,
    )  # fmt: skip
    valid = torch.ones(S, dtype=torch.bool)
    valid[TOKENS : 2 * TOKENS] = False
    memory = Memory(tokens=states[0], bounds=((0, TILES * TOKENS, S),), valid=valid)
    marks = torch.tensor([[False, True, False, True, False, False]])
    view = view_of(memory, marks, torch.ones(1, T).bool(), ["row"], None, "latest_group", blind)
    ours = block(hidden, view)
    torch.testing.assert_close(ours[:, 1:], theirs[:, 1:], atol=1e-5, rtol=1e-5)
    if blind == "unmasked":
        torch.testing.assert_close(ours[:, :1], theirs[:, :1], atol=1e-5, rtol=1e-5)
    else:
        assert torch.equal(ours[:, :1], hidden[:, :1])
        assert not torch.allclose(theirs[:, :1], hidden[:, :1], atol=1e-2)


@pytest.mark.parametrize(("alpha", "normed"), [("vector", True), ("float", False)])
@torch.no_grad()
def test_block_equals_idefics_layer(alpha, normed):
    """The latest image alone is seen; a position before all has the feed-forward branch."""
    config = IdeficsConfig(
        hidden_size=WIDTH, intermediate_size=48, num_attention_heads=4, qk_layer_norms=normed,
        alpha_type=alpha, alpha_initializer="ones", vision_config=dict(embed_dim=20),
        attn_implementation="sdpa",
    )  # fmt: skip
    torch.manual_seed(0)
    layer = IdeficsGatedCrossAttentionLayer(config, layer_idx=0).eval()
    for parameter in layer.parameters():
        parameter.uniform_(0.2, 1.2) if parameter.shape[:-1].numel() == 1 else parameter.normal_(
            std=0.3
        )
    block = GatedBlock(
        GatedBlockConfig(width=WIDTH, memory_width=20, heads=4, kv_heads=4, head_width=8,
                         mlp_width=48, eps=config.rms_norm_eps, qk_norm=normed,
                         gate="vector" if alpha == "vector" else "scalar")
    )  # fmt: skip
    names = {
        "input_layernorm": "attention_norm", "cross_attn.": "", "cross_attn.q_layer_norm": "q_norm",
        "cross_attn.k_layer_norm": "k_norm", "post_attention_layernorm": "mlp_norm",
        "alpha_cross_attn": "attention_gate", "alpha_dense": "mlp_gate",
    }  # fmt: skip
    state = {
        name: tensor.flatten() if name.endswith("_gate") else tensor
        for name, tensor in renamed(layer, names).items()
    }
    block.load_state_dict(state)
    T = 5
    hidden, states = torch.randn(1, T, WIDTH), torch.randn(1, 2 * TOKENS, 20)
    seen = torch.zeros(1, 1, T, 2 * TOKENS, dtype=torch.bool)
    seen[..., 1:3, :TOKENS] = True
    seen[..., 3:, TOKENS:] = True
    mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    gate = seen.any(-1)[:, 0].float()
    theirs = layer(
        hidden, image_hidden_states=states, image_attention_mask=mask, cross_attention_gate=gate
    )
    memory = Memory(tokens=states[0], bounds=((0, TOKENS, 2 * TOKENS),))
    marks = torch.tensor([[False, True, False, True, False]])
    view = view_of(memory, marks, torch.ones(1, T).bool(), ["row"], None, "latest", "feed_forward")
    torch.testing.assert_close(block(hidden, view), theirs, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_positions_before_an_image_do_not_depend_on_it():
    """Exactly: neither branch of any block, nor what later layers make of it."""
    module = tiny.cross_attended()
    made, found = tiny.processor(module), []
    for seed in (1, 2):
        example = tiny.example("r", ("look at ", None, "it"), images=(tiny.image(seed),))
        row = made.encode(example)
        found.append(alone(module, row))
    at = int((row.ids == IMAGE).nonzero())
    assert torch.equal(found[0][:at], found[1][:at])
    assert not torch.allclose(found[0][at:], found[1][at:], atol=1e-3)


@torch.no_grad()
def test_text_alone_is_read_as_by_the_language_model():
    module = tiny.cross_attended()
    row = rows_for(module)[0]
    plain = tiny.decoder_only().text.get_decoder()
    vectors = module.embed(row.ids[None])
    expected = plain(inputs_embeds=vectors, use_cache=False).last_hidden_state[0]
    assert torch.equal(alone(module, row), expected)


@torch.no_grad()
def test_fresh_blocks_leave_the_language_model_as_it_is():
    """Gates begin at 0: with images too, the states are those of the marked text."""
    module = tiny.cross_attended()
    cross = Cross(module.cross.config)
    plain, row = tiny.decoder_only().text, rows_for(module)[2]
    fresh = CrossAttended(module.tokenizer, module.adaptor, cross, plain).eval()
    vectors = fresh.embed(row.ids[None])
    expected = tiny.decoder_only().text.get_decoder()(inputs_embeds=vectors).last_hidden_state
    torch.testing.assert_close(alone(fresh, row)[None], expected)


def test_marks_have_the_vector_of_an_id_where_one_is_named():
    module = tiny.cross_attended(mark_id=258)
    vectors = module.embed(torch.tensor([[IMAGE, 258, 7]]))
    assert torch.equal(vectors[:, 0], vectors[:, 1])
    assert module.cross.mark is None


# How rows are read together


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_rows_in_a_batch_are_read_as_alone(kind):
    """With and without images, one and several: padded on either side, and packed."""
    module = tiny.cross_attended(kind, before=(1,))
    rows = rows_for(module)
    expected = [alone(module, row) for row in rows]
    assert not torch.allclose(expected[1][-4:], alone_text(module, rows[1])[-4:], atol=1e-2)
    for side in ("left", "right"):
        batch = collate(rows, 256, side)
        for found, valid, one in zip(hidden_of(module, batch), batch.valid, expected, strict=True):
            torch.testing.assert_close(found[valid], one, atol=1e-4, rtol=1e-4)
    packed = hidden_of(module, collate_packed(rows))[0]
    torch.testing.assert_close(packed, torch.cat(expected), atol=1e-4, rtol=1e-4)


def alone_text(module, row):
    """The states without the blocks."""
    decoder = module.text.get_decoder()
    return decoder(inputs_embeds=module.embed(row.ids[None])).last_hidden_state[0]


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt_neox"])
def test_gradients_are_exact_when_activations_are_computed_again(kind):
    module = tiny.cross_attended(kind).train()
    batch, found = collate(rows_for(module), 256), []
    for checkpointed in (False, True):
        if checkpointed:
            checkpoint_activations(module, ("cross", "text"))
        module.zero_grad()
        module.states(batch).square().sum().backward()
        found.append({name: p.grad for name, p in module.named_parameters()})
    for name, grad in found[0].items():
        if grad is not None:
            assert torch.equal(grad, found[1][name]), name
    reached = {name for name, grad in found[0].items() if grad is not None}
    assert {name for name, _ in module.cross.named_parameters(prefix="cross")} <= reached


def test_packed_gradients_equal_padded_ones():
    module = tiny.cross_attended()
    rows, found = rows_for(module), []
    for batch in (collate(rows, 256), collate_packed(rows)):
        module.zero_grad()
        NextToken(256).backward(module, [batch], {"tokens": 1}, nullcontext)
        found.append({n: p.grad for n, p in module.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, grad in found[0].items():
        torch.testing.assert_close(grad, found[1][name], atol=1e-3, rtol=1e-4, msg=name)


def test_a_step_of_the_family_is_simulated():
    """Blocks are counted in what a step would hold, and shapes alone decide."""
    chosen = cross_attended_model()
    stage = dataclasses.replace(training.STAGE, rates=(("cross.*", 1e-3), ("*", None)))
    step = SimulatedStep(chosen.module, stage, NextToken(256, pack=200), torch.float32, gpu=False)
    held = step.run([rows_for(chosen.module)]).peak
    cross = sum(p.numel() for p in chosen.module.cross.parameters())
    assert held.optimizer >= 8 * cross
    assert held.activations > 0


@pytest.mark.parametrize("images", [True, False])
def test_dummy_inputs_pass_through_every_block_and_change_nothing(images):
    """A rank whose rows have no image, or fewer sizes of images, makes the calls of the others."""
    module = tiny.cross_attended()
    rows = rows_for(module)
    batch = collate(rows if images else rows[:1], 256)
    dummy = dataclasses.replace(batch, dummy_groups=(_dummy_views(module.tokenizer.pixel_spec),))
    states = module.states(dummy)
    assert torch.equal(states, module.states(batch))
    states.sum().backward()
    assert all(p.grad is not None for p in module.cross.blocks.parameters())
    assert all(p.grad is not None for p in module.adaptor.parameters())
    module.states(dataclasses.replace(_dummy_batch(module), dummy_groups=dummy.dummy_groups))


def test_every_block_is_gathered_by_itself():
    module = tiny.cross_attended()
    units = units_of(module)
    for part in (*module.text.model.layers, *module.cross.blocks, module.adaptor):
        assert any(part is unit for unit in units)


def test_language_models_that_would_not_see_images_are_refused():
    made = tiny.cross_attended()
    from transformers import GPT2Config, GPT2LMHeadModel

    text = GPT2LMHeadModel(GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=4))
    with pytest.raises(ValueError, match=r"decoder has `layers`.*found GPT2LMHeadModel"):
        CrossAttended(made.tokenizer, made.adaptor, made.cross, text)
    cross = Cross(dataclasses.replace(made.cross.config, before=(0, 2)))
    with pytest.raises(ValueError, match=r"expected layers 0 to 1.*found \(0, 2\)"):
        CrossAttended(made.tokenizer, made.adaptor, cross, tiny.text_model())
    block = dataclasses.replace(made.cross.config.block, width=16)
    cross = Cross(dataclasses.replace(made.cross.config, block=block))
    with pytest.raises(ValueError, match="language model's width 32, found 16"):
        CrossAttended(made.tokenizer, made.adaptor, cross, tiny.text_model())

    def drop(decoder, arguments, options):
        return arguments, {k: v for k, v in options.items() if k != MEMORY}

    made.text.get_decoder().register_forward_pre_hook(drop, with_kwargs=True)
    with pytest.raises(ValueError, match=r"does not hand keywords on.*0 of 2 blocks were reached"):
        alone(made, rows_for(made)[1])


@pytest.mark.parametrize("before", [(), (1, 0), (0, 0), (-1,)])
def test_layers_out_of_order_are_refused(before):
    block = tiny.cross_attended().cross.config.block
    with pytest.raises(ValueError, match="before: expected numbers of layers from 0, in order"):
        CrossConfig(block=block, before=before, sees="all")


# Writing


def questions():
    """Unequal lengths: no, one and two images; text before, between and after."""
    return [
        ([], "say something"),
        ([tiny.image(1)], "what is <image> this?"),
        ([tiny.image(2), tiny.image(3, (30, 5))], "<image> how do <image> these two differ?"),
        ([tiny.image(4, (3, 40))], "<image>?"),
    ]


@torch.no_grad()
def naive(model, images, prompt, count):
    """The slow twin: no cache, no batch, the whole row and its images read again for each id."""
    row = model.processor.encode_literal(images, prompt)
    for _ in range(count):
        batch = collate([row], model.processor.pad_id)
        id = model.module.logits(hidden_of(model.module, batch)[:, -1]).argmax(-1)
        row = dataclasses.replace(
            row, ids=torch.cat([row.ids, id]), scored=torch.cat([row.scored, id > 0])
        )
    return row.ids[-count:].tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_ids_in_a_batch_equal_one_by_one_and_the_naive_loop(kind):
    model = cross_attended_model(kind=kind)
    images, prompts = zip(*questions())
    together = model.generate(images, prompts, max_new_tokens=6)
    for found, image_list, prompt in zip(together, images, prompts, strict=True):
        (one,) = model.generate([image_list], [prompt], max_new_tokens=6)
        assert found.ids == one.ids
        assert found.logprobs == pytest.approx(one.logprobs, abs=1e-4)
        assert list(found.ids) == naive(model, image_list, prompt, 6)[: len(found.ids)]
    assert len({found.ids for found in together}) > 1


@pytest.mark.parametrize("sees", ["all", "latest"])
def test_what_is_written_sees_the_images_that_its_rule_says(sees):
    model = cross_attended_model(sees=sees)
    images, prompt = questions()[2]
    (found,) = model.generate([images], [prompt], max_new_tokens=6)
    assert list(found.ids) == naive(model, images, prompt, 6)[: len(found.ids)]
    other = [tiny.image(9), images[1]]  # the first image is another
    row, changed = (model.processor.encode_literal(i, prompt) for i in (images, other))
    a, b = (alone(model.module, one)[-1] for one in (row, changed))
    assert not torch.allclose(a, b, atol=1e-3)  # what stands between them saw the first


@torch.no_grad()
def test_beams_of_a_batch_equal_those_of_rows_alone_and_score_as_read_again():
    model = cross_attended_model()
    images, prompts = zip(*questions())
    together = model.generate(images, prompts, max_new_tokens=5, num_beams=3)
    for found, image_list, prompt in zip(together, images, prompts, strict=True):
        (one,) = model.generate([image_list], [prompt], max_new_tokens=5, num_beams=3)
        assert found.ids == one.ids
        row = model.processor.encode_literal(image_list, prompt)
        ids = torch.cat([row.ids, torch.tensor(found.ids)])
        row = dataclasses.replace(row, ids=ids, scored=torch.arange(len(ids)) >= len(row.ids))
        loss = engine.answer_losses(model.module, collate([row], model.processor.pad_id))
        assert float(-loss) == pytest.approx(sum(found.logprobs), abs=1e-3)


@pytest.mark.parametrize("beams", [1, 3])
def test_keys_and_values_of_the_memory_are_computed_once(beams):
    model, calls = cross_attended_model(), []
    for block in model.module.cross.blocks:
        block.k_proj.register_forward_hook(lambda *_: calls.append(1))
    model.generate([[tiny.image()]], ["<image> what?"], max_new_tokens=5, num_beams=beams)
    assert len(calls) == len(model.module.cross.blocks)


def test_a_conversation_encodes_each_image_once_and_says_what_one_reading_says():
    from vlm.families.decoder_only.chat import Chat

    model, calls = cross_attended_model(), []
    model.module.tokenizer.register_forward_hook(lambda *_: calls.append(1))
    chat = Chat(model)
    first, second = tiny.image(1), tiny.image(2)
    said = chat.ask([{"type": "image", "image": first}, {"type": "text", "text": "what?"}],
                    max_new_tokens=4)  # fmt: skip
    again = chat.ask([{"type": "text", "text": "and"}, {"type": "image", "image": second}],
                     max_new_tokens=4)  # fmt: skip
    assert len(calls) == 2
    turns = (Turn("user", (None, "what?")), Turn("assistant", (said,)), Turn("user", ("and", None)))
    row = model.processor.encode_prompt(Example("chat", turns, (first, second)))
    (read,) = model.write_after([row], max_new_tokens=4)
    assert again == read.text


def test_score_and_image_gain_read_each_answer_with_its_own_images():
    model = cross_attended_model()
    images, prompts = zip(*questions())
    answers = ["a", "bc", "def", "g"]
    together = model.score(images, prompts, answers)
    for number, (image_list, prompt) in enumerate(zip(images, prompts)):
        one = model.score([image_list], [prompt], [answers[number]])
        assert float(one) == pytest.approx(float(together[number]), abs=1e-3)
    rows = [model.processor.encode_literal(i, p, a) for i, p, a in zip(images, prompts, answers)]
    right, wrong = engine.image_gain(model.module, collate(rows, 256))
    torch.testing.assert_close(-right, together, atol=1e-3, rtol=1e-4)
    assert wrong.isnan().tolist() == [True, False, True, False]
    swapped = model.score([images[3]], [prompts[1]], [answers[1]])
    assert float(-wrong[1]) == pytest.approx(float(swapped), abs=1e-3)
