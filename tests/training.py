"""A tiny run for laws of training: `python -m tests.training OUT [options as JSON]` is one process
of it, so that it can be launched on several, killed and resumed; with {"runs": {NAME: options}} of
several, one after another, in OUT/NAME."""

import dataclasses
import json
import os
import signal
import sys
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

import vlm
from tests import contrastive_models, encoder_decoders, line_readers, tiny
from vlm.data.example import caption_example
from vlm.data.mixture import Draw, Mixture, MixtureDataset
from vlm.data.sources import ListSource
from vlm.families.contrastive.model import ContrastiveModel
from vlm.families.contrastive.processor import PairProcessor
from vlm.families.cross_attended.model import CrossAttendedModel
from vlm.families.decoder_only.batch import collate
from vlm.families.decoder_only.model import DecoderOnlyModel
from vlm.families.line_reader.model import LineReaderModel
from vlm.training.fit import Interrupted, LoopConfig, fit
from vlm.training.flop_cost import flop_cost_of
from vlm.training.objectives.contrastive import Contrast
from vlm.training.objectives.ctc import Transcribe
from vlm.training.objectives.next_token import NextToken
from vlm.training.run_folder import Run
from vlm.training.runs.contrastive import retrieval_on
from vlm.training.sharding import gathered, whole_on_first
from vlm.training.stages import FROZEN, Stage
from vlm.training.state import TrainState

STAGE = Stage(
    name="tiny",
    rates=(("adaptor.*", 1e-2), ("tokenizer.*", FROZEN), ("text.*", FROZEN)),
    steps=6,
    batch=4,
    micro_batch=4,
    warmup_steps=2,
)
CONTRAST = dataclasses.replace(STAGE, name="pairs", rates=(("*", 1e-3),), batch=8, micro_batch=8)


def examples():
    """Images and text alone, with answers of unequal lengths."""
    rows = [
        tiny.example(f"r{i}", (None, "what?"), "word " * (1 + i % 5), images=(tiny.image(i),))
        for i in range(10)
    ]
    rows += [tiny.example(f"t{i}", ("say it",), "long answer " * (i + 1)) for i in range(3)]
    return rows


def model(**options):
    module = tiny.decoder_only(**options)
    processor = tiny.processor(module)
    return DecoderOnlyModel(module=module, processor=processor, stop_ids=(processor.end_id,))


def cross_attended_model(**options):
    module = tiny.cross_attended(**options)
    processor = tiny.processor(module)
    return CrossAttendedModel(module=module, processor=processor, stop_ids=(processor.end_id,))


def pairs(count=11, unread=()):
    """Images with captions of unequal lengths; those numbered in `unread` have an empty one."""
    captions = ["" if i in unread else f"{i} " + "ab" * (1 + i % 4) for i in range(count)]
    return [
        tiny.example(f"p{i}", (None, "what?"), caption, images=(tiny.image(i),))
        for i, caption in enumerate(captions)
    ]


def encoder_decoder_model():
    """A tiny TrOCR-like model without dropout."""
    module = encoder_decoders.model(dropout=0.0)
    return SimpleNamespace(module=module, processor=encoder_decoders.processor(module))


def line_model():
    """A tiny line reader."""
    return line_readers.parts()


def text_lines():
    """Lines of several widths, so that ranks differ in how many they read together."""
    texts = ["ab", "a", "cab", "b a", "c", "abc b"]
    return [
        line_readers.line(text, width=(48, 96, 300)[i % 3], seed=i) for i, text in enumerate(texts)
    ]


def images_alone():
    """Images with texts of unequal lengths."""
    return [
        caption_example(f"r{i}", tiny.image(i), "word " * (1 + i % 5) + str(i), "")
        for i in range(11)
    ]


def contrastive_model(loss="sigmoid", text="clip, largest", **options):
    """A tiny two-tower model for a loss; of the texts, "bert, class" has dropout."""
    bias = -10.0 if loss == "sigmoid" else None
    module = contrastive_models.model("attention", text, bias=bias, **options)
    processor = PairProcessor(
        contrastive_models.text_tokenizer(),
        module.tokenizer.pixel_spec,
        length=12,
        pad_to_length=False,
    )
    return ContrastiveModel(module=module, processor=processor)


def dataset(rows=None, seed=0, on_bad_row="raise"):
    source = ListSource(examples() if rows is None else rows, "tiny")
    return MixtureDataset([source], Mixture([source], seed=seed), on_bad_row)


def in_order(rows):
    """A dataset that gives the rows in their own order, so that a test decides who gets which."""
    chosen = dataset(rows)
    chosen.mixture = InOrder(chosen.mixture)
    return chosen


class InOrder:
    def __init__(self, mixture):
        self.lengths, self.weights, self.seed = mixture.lengths, mixture.weights, mixture.seed
        self.warmup = None

    def __getitem__(self, number):
        epoch, row = divmod(number, self.lengths[0])
        return Draw(0, row, epoch)


def split_by_kind():
    """Rows of which, in batches of 4 over 2 ranks, rank 0 has images and rank 1 has none."""
    rows = examples()
    return [*rows[0:2], *rows[10:12], *rows[2:4], rows[12], rows[10]]


def of_many_sizes():
    """Rows of images of several sizes, two images and none, in one batch of 4 rows and the next."""
    rows = [
        tiny.example(
            f"r{i}",
            (None, "what?"),
            "word " * (1 + i % 5),
            (tiny.image(i, (9 + 30 * (i % 3), 40)),),
        )
        for i in range(5)
    ]
    two = tiny.example(
        "two", (None, "and", None, "?"), "a", (tiny.image(7), tiny.image(8, (90, 20)))
    )
    alone = [tiny.example(f"t{i}", ("say it",), "long answer " * (i + 1)) for i in range(2)]
    return [rows[0], rows[1], *alone, rows[2], two, rows[3], rows[4]]


def train(out, stage=STAGE, rows=None, chosen=None, seed=0, resume=False, precision="fp32",
          on_bad_row="raise", dropout=0.0, data=None, loss=None, evaluate=None, change=(),
          shard="no", token_cache=None, pack=None, balance=False, objective=None,
          **loop):  # fmt: skip
    """Trains and gives (model, progress, lines of metrics.jsonl). loss: of a contrastive model;
    None trains a decoder-only one, with rows padded or packed. balance: whether rows are dealt out
    by their cost. objective: in place of the family's own. loop: more of `LoopConfig`."""
    if loss:
        chosen, rows = chosen or contrastive_model(loss), rows or pairs()
    chosen = chosen or model()
    if dropout:
        chosen.module.adaptor.layers.append(torch.nn.Dropout(dropout))
    AcceleratorState._reset_state(reset_partial_state=not torch.distributed.is_initialized())
    accelerator = Accelerator(cpu=True, mixed_precision="bf16" if precision == "bf16" else "no")
    deciding = {"steps": stage.steps, "batch": stage.batch, "seed": seed}
    run = Run(Path(out), deciding, deciding, main=accelerator.is_main_process, resume=resume)
    cost = flop_cost_of(chosen.module, stage.rates) if balance else None
    config = {"workers": 0, "save_every": 0, **loop}
    progress = fit(
        chosen, stage, data or dataset(rows, seed, on_bad_row), run, accelerator,
        objective or objective_for(chosen, loss, pack, cost),
        LoopConfig(precision=precision, shard=shard, token_cache=token_cache, resume=resume,
                   change=change, **config),
        balance=cost and cost.of_row, evaluate=evaluate,
    )  # fmt: skip
    return chosen, progress, run.history()


def objective_for(chosen, loss, pack, cost=None):
    if isinstance(chosen, LineReaderModel):
        return Transcribe()
    return Contrast(loss) if loss else NextToken(chosen.processor.pad_id, pack, cost)


class TwoTotals(NextToken):
    """A toy objective of two means: of the scored tokens' losses, and of the squares of what the
    adaptor makes of each image."""

    totals = ("tokens", "images")

    def count(self, batch):
        count = super().count(batch)
        return count._replace(totals={**count.totals, "images": count.images})

    def backward(self, module, batches, totals, autocast):
        loss = super().backward(module, batches, totals, autocast)
        for batch in batches:
            if batch.groups:
                vectors, _ = module.encode(batch.groups)
                share = vectors.pow(2).sum() / totals["images"]
                share.backward()
                loss += float(share.detach())
        return loss


@torch.no_grad()
def states_on_first(chosen):
    """An evaluation that the first rank alone makes."""
    if int(os.environ.get("RANK", 0)):
        return {"rows": 0.0}
    rows = [chosen.processor.encode(example) for example in examples()[:2]]
    batch = collate(rows, chosen.processor.pad_id)
    tokens = chosen.module.encode(batch.groups)  # the parts one by one, as evaluations call them
    states = chosen.module.read(chosen.module.embed(batch.ids, tokens, batch.names), batch)
    return {"rows": float(len(rows)), "finite": float(states.isfinite().all())}


@contextmanager
def keep_gradients(out):
    """Within, the first process writes each step's whole gradients to OUT/gradients_NUMBER.pt."""
    norm_of = TrainState.clip_gradients

    def norm_and_keep(self):
        norm = norm_of(self)
        found = {}
        for name, parameter in self.module.named_parameters():
            if parameter.grad is not None:
                grad = parameter.grad
                whole = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
                found[name] = whole.cpu().clone()
        if int(os.environ.get("RANK", 0)) == 0:
            number = sum(1 for _ in Path(out).glob("gradients_*.pt"))
            torch.save(found, Path(out) / f"gradients_{number}.pt")
        return norm

    TrainState.clip_gradients = norm_and_keep
    try:
        yield
    finally:
        TrainState.clip_gradients = norm_of


def weights(chosen):
    whole = {}
    for name, parameter in chosen.module.named_parameters():
        tensor = parameter.detach()
        whole[name] = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor.clone()
    return whole


def run_one(out, options):
    """One run of a process, from its options as JSON has them."""
    log = Run.log
    data = None
    if "machine_of" in options:
        os.environ["LOCAL_WORLD_SIZE"] = str(options.pop("machine_of"))
    if options.pop("split_by_kind", False):
        data = in_order(split_by_kind())
    if "unread" in options:
        data = in_order(pairs(8, options.pop("unread")))
        data.on_bad_row = "skip"
    kill_at, stop = options.pop("kill_at", None), options.pop("stop", None)
    stage = CONTRAST if "loss" in options else STAGE
    stage = dataclasses.replace(stage, **options.pop("stage", {}))

    def log_and_end(self, step, figures):
        log(self, step, figures)
        if step == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if stop and step == stop["step"] and int(os.environ.get("RANK", 0)) in stop["ranks"]:
            os.kill(os.getpid(), signal.SIGTERM)

    if options.pop("two_totals", False):
        options["objective"] = TwoTotals(model().processor.pad_id)
    if second := options.pop("docked", None):
        from tests import docked  # which takes from here

        options["chosen"], data = docked.model(), docked.split_by_kind(second)
    family = options.pop("family", None)
    if family == "encoder_decoder":
        options["chosen"], data = encoder_decoder_model(), dataset(images_alone())
    if family == "cross_attended":
        options["chosen"] = cross_attended_model()
    if family == "line_reader":
        options["chosen"], data = line_model(), dataset(text_lines())
    if "folder" in options:
        options["chosen"] = vlm.load(options.pop("folder"), "cpu")
        data = in_order(of_many_sizes())
    gradients = keep_gradients(out) if options.pop("gradients", False) else nullcontext()
    if options.pop("evaluate_on_first", False):
        options["chosen"] = model()
        options["evaluate"] = partial(states_on_first, options["chosen"])
    try:
        Run.log = log_and_end
        with gradients:
            chosen, _, _ = train(out, stage, data=data, **options)
    finally:
        Run.log = log
    if "loss" in options:  # 7 rows, which two ranks do not share evenly
        with gathered(chosen.module):
            held_out = retrieval_on(
                chosen, ListSource(pairs(7), "held out"), range(7), Accelerator(), 2
            )
        Path(out, f"held_out{os.environ.get('RANK', 0)}.json").write_text(json.dumps(held_out))
    if family == "line_reader":
        with whole_on_first(chosen.module):
            if int(os.environ.get("RANK", 0)) == 0:
                chosen.save(Path(out) / "model")
    whole = weights(chosen)  # of sharded ones, by all ranks together
    if int(os.environ.get("RANK", 0)) == 0:
        torch.save(whole, Path(out) / "weights.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    options = json.loads(sys.argv[2]) if len(sys.argv) > 2 else {}
    for name, given in options.pop("runs", {"": options}).items():
        try:
            run_one(Path(sys.argv[1], name), given)
        except Interrupted:
            if not name:
                raise
    if int(os.environ.get("RANK", 0)) == 0:
        Path(sys.argv[1], "world").write_text(os.environ.get("WORLD_SIZE", "1"))
    if torch.distributed.is_initialized():  # leave together: gloo aborts a rank whose peer is gone
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
