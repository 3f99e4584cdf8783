import copy
import json

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from tests import tiny, towers, training
from vlm import load
from vlm.lora import Lora, add_lora, lora_of, quantize_4bit
from vlm.training import stages
from vlm.training.stages import FROZEN, Stage
from vlm.weights import same_bits


def stir(module, seed=1):
    """Makes LoRA-B weigh, as after training."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)


def stage(*rates, **more):
    return Stage(
        **{**dict(name="t", rates=rates, steps=4, batch=4, micro_batch=4, warmup_steps=0), **more}
    )


LORA_ONLY = (("*lora_*", 1e-2), ("*", FROZEN))


def test_added_lora_changes_no_output_and_no_global_random_state():
    module = towers.composed(towers.timm_vit())
    batch = towers.batch_for(module)
    before = module(batch)
    torch.manual_seed(3)
    state = torch.get_rng_state()
    add_lora(module, {path: Lora(rank=4) for path in ("tokenizer", "adaptor", "text")})
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(module(batch), before)


def test_lora_stands_beside_all_linear_layers_but_head_and_embeddings():
    module = towers.composed(towers.timm_vit(), kind="qwen2")
    linear = {
        name
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear) and name != "text.lm_head"
    }
    add_lora(module, {path: Lora(rank=4) for path in ("tokenizer", "adaptor", "text")})
    found = {n.split(".lora_A")[0] for n, _ in module.named_parameters() if "lora_A" in n}
    assert found == linear
    assert set(lora_of(module)) == {"tokenizer", "adaptor", "text"}


def test_lora_of_a_convolutional_net_stands_beside_its_dense_convolutions():
    module = towers.composed(towers.timm_net("tf_efficientnet_lite0"))
    dense = {
        name
        for name, layer in module.tokenizer.named_modules()
        if type(layer) is nn.Conv2d and layer.groups == 1
    }
    add_lora(module, {"tokenizer": Lora(rank=2)})
    names = [n for n, _ in module.tokenizer.named_parameters() if "lora_A" in n]
    assert {name.split(".lora_A")[0] for name in names} == dense != set()


def test_lora_of_a_deeper_component_leaves_its_neighbour_alone():
    from vlm.tokenizers.paired import AverageNeck, PairedTokenizer

    high, low = towers.timm_vit(size_hw=(64, 64)), towers.timm_vit(size_hw=(32, 32))
    tower = PairedTokenizer(high, low, low_from="picture", high_neck=AverageNeck(24))
    module = towers.composed(tower)
    add_lora(module, {"tokenizer.low": Lora(rank=4, targets=("*.qkv",))})
    names = {n for n, _ in module.named_parameters() if "lora_" in n}
    assert len(names) == 4
    assert all(n.startswith("tokenizer.low.backbone.blocks") and ".attn.qkv." in n for n in names)


@pytest.mark.parametrize("text", ["llama", "qwen2"])
def test_a_stage_trains_lora_alone_with_fp32_masters_and_frozen_bits(tmp_path, text):
    chosen = training.model(kind=text)
    chosen.module.to(torch.bfloat16)
    add_lora(chosen.module, {"text": Lora(rank=4, dropout=0.1), "adaptor": Lora(rank=4)})
    before = training.weights(chosen)
    rates = (("text.*lora_*", 1e-2), ("adaptor.*lora_*", 1e-2), ("*", FROZEN))
    plan = stage(*rates, weight_decay=0.1)
    _, progress, history = training.train(tmp_path, plan, chosen=chosen, precision="bf16")
    assert progress.step == 4
    for name, parameter in chosen.module.named_parameters():
        is_lora = "lora_" in name
        assert parameter.dtype == (torch.float32 if is_lora else torch.bfloat16)
        assert parameter.requires_grad == is_lora
        assert is_lora != torch.equal(parameter, before[name].to(parameter.dtype))
    assert history[-1]["loss"] < history[0]["loss"]


def test_optimizer_holds_lora_alone():
    module = towers.composed(towers.timm_vit())
    add_lora(module, {"tokenizer": Lora(rank=4)})
    plan = stage(*LORA_ONLY)
    stages.prepare(module, plan, torch.float32)
    held = {id(p) for g in stages.optimizer_for(module, plan).param_groups for p in g["params"]}
    assert held == {id(p) for n, p in module.named_parameters() if "lora_" in n}


def test_lora_beside_a_bf16_base_runs_in_and_out_of_autocast():
    module = towers.composed(towers.timm_vit()).to(torch.bfloat16)
    add_lora(module, {"tokenizer": Lora(rank=4), "text": Lora(rank=4)})
    stages.prepare(module, stage(*LORA_ONLY), torch.bfloat16)
    batch = towers.batch_for(module)
    with Accelerator(cpu=True, mixed_precision="bf16").autocast():
        towers.loss_of(module, batch).backward()
    assert all(p.grad is not None for p in module.parameters() if p.requires_grad)
    assert module(batch.to("cpu", torch.bfloat16)).dtype == torch.bfloat16


def test_batch_norms_stay_in_evaluation_mode_beside_lora():
    module = towers.composed(towers.timm_net("tf_efficientnet_lite0"))
    add_lora(module, {"tokenizer": Lora(rank=2)})
    norms = {n: b.clone() for n, b in module.named_buffers() if "running" in n}
    stages.prepare(module, stage(*LORA_ONLY), torch.float32)
    towers.loss_of(module, towers.batch_for(module)).backward()
    assert all(torch.equal(b, norms[n]) for n, b in module.named_buffers() if n in norms)


@pytest.mark.parametrize("tower", towers.TOWERS)
def test_merged_folder_gives_the_outputs_of_the_live_model(tmp_path, tower):
    module = towers.composed(towers.TOWERS[tower]())
    chosen = towers.model(module)
    plain = set(module.state_dict())
    add_lora(module, {path: Lora(rank=4) for path in ("tokenizer", "adaptor", "text")})
    stir(module)
    batch = towers.batch_for(module)
    with torch.no_grad():
        expected = module(batch)
    before = copy.deepcopy(module.state_dict())
    chosen.save(tmp_path)
    assert same_bits(module.state_dict(), before)
    again = load(tmp_path, dtype="float32")
    assert set(again.module.state_dict()) == plain
    assert json.loads((tmp_path / "config.json").read_text())["lora"] == {}
    with torch.no_grad():
        torch.testing.assert_close(again.module(batch), expected, atol=1e-4, rtol=1e-5)


def test_unmerged_folder_makes_the_lora_layers_again_and_training_goes_on(tmp_path):
    chosen = towers.model(towers.composed(towers.timm_vit(), kind="qwen2"))
    text = Lora(rank=4, alpha=8, dropout=0.2)
    add_lora(chosen.module, {"text": text, "tokenizer": Lora(rank=2, targets=("*.qkv",))})
    stir(chosen.module)
    chosen.save(tmp_path / "kept", merge=False)
    again = load(tmp_path / "kept", dtype="float32")
    assert same_bits(again.module.state_dict(), chosen.module.state_dict())
    assert lora_of(again.module) == lora_of(chosen.module)
    batch = towers.batch_for(chosen.module)
    assert torch.equal(again.module(batch), chosen.module(batch))
    plan = stage(*LORA_ONLY)
    _, _, one = training.train(tmp_path / "a", plan, chosen=chosen)
    _, _, two = training.train(tmp_path / "b", plan, chosen=again)
    assert [line["loss"] for line in one] == [line["loss"] for line in two]


def test_folders_from_before_lora_still_open(tmp_path):
    chosen = towers.model(towers.composed(towers.timm_vit()))
    chosen.save(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    del values["lora"]
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert same_bits(load(tmp_path).module.state_dict(), chosen.module.state_dict())


def test_merging_holds_one_shard_of_made_weights_at_most(tmp_path, monkeypatch):
    from vlm import weights

    module = towers.composed(towers.timm_vit())
    add_lora(module, {"text": Lora(rank=4)})
    stir(module)
    monkeypatch.setattr(weights, "MADE_SHARD", 20_000)
    written = []
    save_file = weights.save_file

    def note(tensors, *rest):
        written.append(sum(t.numel() * t.element_size() for t in tensors.values()))
        save_file(tensors, *rest)

    monkeypatch.setattr(weights, "save_file", note)
    tmp_path.joinpath("model-00001-of-00099.safetensors").touch()  # of an older save
    weights.save_weights(module, tmp_path)
    assert len(written) > 3
    largest = max(p.numel() * 4 for p in module.parameters())
    assert max(written) <= max(20_000, largest)
    read = weights.read_weights(tmp_path)
    assert not any("lora" in key or "base_layer" in key for key in read)
    assert not (tmp_path / "model-00001-of-00099.safetensors").exists()


@pytest.mark.parametrize(
    ("components", "message"),
    [
        ({"vision": Lora()}, r"no component 'vision': the parts are \['adaptor', 'text', 'token"),
        ({"tokenizer.low": Lora()}, "no component 'tokenizer.low'"),
        ({"": Lora()}, "no component ''"),
        ({"text.model.norm": Lora()}, "text.model.norm has no layer that takes LoRA"),
        ({"text": Lora(targets=("*.q_proj", "*.qkv"))}, r"targets \['\*.qkv'\] match no layer"),
        ({"text": Lora(targets=("lm_head",))}, r"targets \['lm_head'\] match no layer"),
        ({"text": Lora(), "text.model": Lora()}, "components lie within others"),
    ],
)
def test_lora_is_refused_by_name_before_anything_changes(components, message):
    module = towers.composed(towers.timm_vit())
    before = list(module.state_dict())
    with pytest.raises(ValueError, match=message):
        add_lora(module, {"adaptor": Lora(), **components})
    assert list(module.state_dict()) == before


def test_lora_twice_on_a_component_is_refused():
    module = towers.composed(towers.timm_vit())
    add_lora(module, {"text": Lora()})
    with pytest.raises(ValueError, match="text has LoRA layers already"):
        add_lora(module, {"text": Lora()})


@pytest.mark.parametrize(
    ("field", "message"),
    [({"rank": 0}, "rank"), ({"alpha": 0}, "alpha"), ({"dropout": 1.0}, "dropout")],
)
def test_lora_values_out_of_range_are_refused(field, message):
    with pytest.raises(ValueError, match=message):
        Lora(**field)


def test_fused_attention_weights_are_refused_by_name_and_can_be_left_out():
    module = towers.composed(towers.open_clip_tower())
    with pytest.raises(ValueError, match=r"attn.in_proj_weight.*name the layers") as caught:
        add_lora(module, {"tokenizer": Lora()})
    assert "out_proj" in str(caught.value)
    add_lora(module, {"tokenizer": Lora(targets=("*.c_fc", "*.c_proj"))})
    assert sum("lora_B" in n for n, _ in module.named_parameters()) == 4


def test_layers_whose_weight_is_read_without_a_call_are_refused_by_name():
    module = towers.composed(towers.timm_vit("beit_base_patch16_224", qkv_bias=True))
    with pytest.raises(ValueError, match=r"without calling them.*blocks.0.attn.qkv"):
        add_lora(module, {"tokenizer": Lora(rank=4)})
    add_lora(module, {"tokenizer": Lora(rank=4, targets=("*.proj", "*.fc?"))})


def test_four_bit_weights_without_bitsandbytes_name_the_package(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(
        ImportError,
        match=r'bitsandbytes, which is not installed; try: pip install "vlm\[quantize\]"',
    ):
        quantize_4bit(tiny.text_model())


def test_lora_trains_beside_four_bit_weights_and_saves_plain_ones(tmp_path):
    pytest.importorskip("bitsandbytes")
    chosen = towers.model(towers.composed(towers.timm_vit(), width=64).to(torch.bfloat16))
    plain = set(chosen.module.state_dict())
    quantize_4bit(chosen.module.text)
    chosen.module.to("cpu")
    add_lora(chosen.module, {"text": Lora(rank=4, targets=("*_proj",))})
    packed = chosen.module.text.model.layers[0].self_attn.q_proj.base_layer.weight
    assert packed.dtype == torch.uint8
    training.train(tmp_path / "run", stage(*LORA_ONLY), chosen=chosen, precision="bf16")
    again = chosen.module.text.model.layers[0].self_attn.q_proj.base_layer.weight
    assert torch.equal(again, packed)
    batch = towers.batch_for(chosen.module).to("cpu", torch.bfloat16)
    chosen.save(tmp_path / "model")
    read = load(tmp_path / "model").module
    assert set(read.state_dict()) == plain
    expected, found = chosen.module(batch).float(), read(batch).float()
    assert (expected - found).norm() < 0.05 * expected.norm()


def test_fused_experts_are_refused_by_name():
    from transformers import AutoModelForCausalLM, MixtralConfig

    module = tiny.decoder_only()
    config = MixtralConfig(
        vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=4,
    )  # fmt: skip
    module.text = AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(ValueError, match=r"model.layers.0.mlp.experts.\w+"):
        add_lora(module, {"text": Lora()})
    add_lora(module, {"text": Lora(targets=("*.?_proj",))})


def test_published_layouts_have_no_place_for_lora_layers(tmp_path):
    chosen = towers.model(towers.composed(towers.timm_vit()))
    chosen.reference = object()
    with pytest.raises(ValueError, match="only the layout 'native' can hold LoRA"):
        chosen.save(tmp_path, layout="reference", merge=False)
