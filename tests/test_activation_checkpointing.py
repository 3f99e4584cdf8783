import pytest
import torch
from torch import nn

from tests import tiny, towers, training
from vlm.families.decoder_only import generate as engine
from vlm.lora import Lora, add_lora
from vlm.tokenizers.paired import AverageNeck, PairedTokenizer
from vlm.training.activation_checkpointing import checkpoint_activations, kept_parts, saved_bytes
from vlm.training.stages import FROZEN, Stage, prepare
from vlm.vocabulary import train_rows

ADAPTOR_ALONE = (("adaptor.*", 1e-3), ("*", FROZEN))
ADAPTOR_AND_TEXT = (("tokenizer.*", FROZEN), ("*", 1e-3))
ALL_BUT_HIGH = (("tokenizer.high.*", FROZEN), ("*", 1e-3))


def stage(rates):
    return Stage(name="t", rates=rates, steps=4, batch=4, micro_batch=4, warmup_steps=0)


def prepared(module, rates, dtype=torch.float32):
    prepare(module, stage(rates), dtype)
    return module


def pass_through(module, batch):
    """(loss, gradients, bytes kept) of one forward and backward pass."""
    module.zero_grad()
    with saved_bytes() as kept:
        loss = towers.loss_of(module, batch)
    loss.backward()
    gradients = {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}
    return loss.detach(), gradients, sum(kept.values())


def kept_within(module, batch, path):
    """Bytes that the part at `path` keeps during a forward pass of the whole."""
    part = module.get_submodule(path)
    marks = []
    with saved_bytes() as kept:
        part.register_forward_pre_hook(lambda *_: marks.append(sum(kept.values())))
        part.register_forward_hook(lambda *_: marks.append(sum(kept.values())))
        towers.loss_of(module, batch)
    (before, after) = marks
    return after - before


def paired():
    """A model with two towers, the high one seeing four times the pixels of the low one."""
    high, low = towers.timm_vit(size_hw=(64, 64)), towers.transformers_tower("siglip_vision_model")
    return towers.composed(
        PairedTokenizer(high, low, low_from="picture", high_neck=AverageNeck(high.dim))
    )


@pytest.mark.parametrize("tower", [*towers.TOWERS, "open_clip", "Swin", "ConvNeXt", "SAM"])
def test_checkpointing_keeps_less_and_gives_the_same_bits(tower):
    module = towers.composed(towers.MORE_TOWERS[tower]())
    batch = towers.batch_for(module)
    loss, gradients, kept = pass_through(module, batch)
    for path in ("tokenizer", "text"):
        checkpoint_activations(module, (path,))
        again, same, less = pass_through(module, batch)
        assert torch.equal(again, loss)
        assert gradients.keys() == same.keys()
        assert all(torch.equal(same[name], gradients[name]) for name in gradients)
        assert less < kept
        kept = less


@pytest.mark.parametrize("kind", ["qwen3", "gemma3_text", "cohere"])
def test_a_frozen_text_model_keeps_less_where_checkpointed(kind):
    """In evaluation mode, in which the switches of transformers do nothing."""
    module = prepared(tiny.decoder_only(kind), ADAPTOR_ALONE)
    assert not module.text.training
    batch = towers.batch_for(module)
    loss, gradients, kept = pass_through(module, batch)
    checkpoint_activations(module, ("text",))
    again, same, less = pass_through(module, batch)
    assert torch.equal(again, loss)
    assert all(torch.equal(same[name], gradients[name]) for name in gradients)
    assert less < 0.5 * kept


@pytest.mark.parametrize("tower", towers.TOWERS)
def test_every_lora_b_of_the_tower_learns_beneath_checkpointing(tower):
    """Pixels, and in a frozen base all that enters a block, need no gradient."""
    module = towers.composed(towers.TOWERS[tower]())
    add_lora(module, {"tokenizer": Lora(rank=4)})
    checkpoint_activations(module)
    prepared(module, (("tokenizer.*lora_*", 1e-3), ("*", FROZEN)))
    _, gradients, _ = pass_through(module, towers.batch_for(module))
    wanted = {n for n, _ in module.named_parameters() if "lora_B" in n}
    assert wanted
    assert {n for n in wanted if n in gradients and bool(gradients[n].abs().sum() > 0)} == wanted


def test_lora_dropout_is_the_same_when_computed_again():
    module = towers.composed(towers.timm_vit())
    add_lora(module, {"tokenizer": Lora(rank=4, dropout=0.5), "text": Lora(rank=4, dropout=0.5)})
    prepared(module, (("*lora_*", 1e-3), ("*", FROZEN)))
    batch, results = towers.batch_for(module), []
    for checkpointed in (False, True):
        if checkpointed:
            checkpoint_activations(module)
        torch.manual_seed(5)
        results.append(pass_through(module, batch))
    (loss, gradients, kept), (again, same, less) = results
    assert torch.equal(loss, again)
    assert all(torch.equal(same[name], gradients[name]) for name in gradients)
    assert less < kept


def test_checkpointed_model_generates_the_same():
    module = tiny.decoder_only("qwen3")
    processor = tiny.processor(module)
    from vlm.families.decoder_only.batch import collate

    rows = [processor.encode_prompt(tiny.example(f"r{i}").question()) for i in range(2)]
    batch = collate(rows, processor.pad_id, "left")
    before = engine.generate(module, batch, (258,), 256, max_new_tokens=8)
    checkpoint_activations(module, ("text",))
    assert engine.generate(module, batch, (258,), 256, max_new_tokens=8) == before


def test_a_checkpointed_run_has_the_losses_of_one_without(tmp_path):
    losses = []
    for name in ("plain", "checkpointed"):
        chosen = training.model(kind="qwen2")
        add_lora(chosen.module, {"text": Lora(rank=4, dropout=0.1)})
        if name == "checkpointed":
            checkpoint_activations(chosen.module, ("text",))
        plan = stage((("text.*lora_*", 1e-2), ("adaptor.*", 1e-2), ("*", FROZEN)))
        _, _, history = training.train(tmp_path / name, plan, chosen=chosen, precision="bf16")
        losses.append([line["loss"] for line in history])
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (("tokenizer",), "tokenizer: ModifiedResNet has no blocks"),
        (("vision",), r"no part 'vision': the parts are \['adaptor', 'text', 'tokenizer'\]"),
        (("adaptor",), "adaptor: MLP has no blocks"),
    ],
)
def test_checkpointing_is_refused_by_name_where_it_cannot_be(parts, message):
    module = towers.composed(towers.open_clip_tower(layers=[1, 1, 1, 1]))
    with pytest.raises(ValueError, match=message):
        checkpoint_activations(module, parts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rates", [ADAPTOR_ALONE, ADAPTOR_AND_TEXT], ids=["first", "second"])
def test_a_frozen_tokenizer_keeps_nothing_in_the_first_two_stages(rates, dtype):
    module = prepared(paired(), rates, dtype)
    batch = towers.batch_for(module)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        assert kept_within(module, batch, "tokenizer") == 0
        assert kept_within(module, batch, "adaptor") > 0
        # The gradient of the adaptor passes through the language model, trained or not.
        assert kept_within(module, batch, "text.model") > 0


def test_a_frozen_high_tower_keeps_nothing_beside_a_trained_low_one():
    """The third stage of DeepSeek-VL."""
    module = prepared(paired(), ALL_BUT_HIGH)
    batch = towers.batch_for(module)
    assert kept_within(module, batch, "tokenizer.high") == 0
    assert kept_within(module, batch, "tokenizer.low") > 0


def test_lora_in_the_last_block_alone_keeps_nothing_below_it():
    module = towers.composed(towers.timm_vit())
    add_lora(module, {"tokenizer": Lora(rank=4, targets=("*.blocks.1.*",))})
    prepared(module, (("tokenizer.*lora_*", 1e-3), ("*", FROZEN)))
    batch = towers.batch_for(module)
    assert kept_within(module, batch, "tokenizer.backbone.blocks.0") == 0
    assert kept_within(module, batch, "tokenizer.backbone.blocks.1") > 0


def test_new_rows_alone_keep_nothing_of_the_image_side():
    module = towers.composed(towers.timm_vit())
    train_rows(module.text, [258, 259])
    prepared(module, (("text.*.new", 1e-3), ("*", FROZEN)))
    batch = towers.batch_for(module)
    assert kept_within(module, batch, "tokenizer") == kept_within(module, batch, "adaptor") == 0


def test_saved_bytes_count_each_storage_once_and_no_parameter():
    layer = nn.Linear(4, 8, bias=False)
    x = torch.randn(2, 4)
    with saved_bytes() as kept:
        (layer(x) + layer(x)).sum()
    assert sum(kept.values()) == x.numel() * 4


def test_kept_parts_are_those_that_gradients_pass():
    module = tiny.decoder_only()
    assert kept_parts(module, stage(ADAPTOR_ALONE)) == ["text"]
    assert kept_parts(module, stage((("*", 1e-3),))) == ["tokenizer", "text"]
    pairs = training.contrastive_model("sigmoid").module
    assert kept_parts(pairs, stage((("tokenizer.*", FROZEN), ("*", 1e-3)))) == ["text"]
    assert kept_parts(training.line_model().module, stage((("*", 1e-3),))) == ["tokenizer"]
