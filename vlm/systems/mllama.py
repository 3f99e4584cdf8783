"""Mllama (Llama 3.2 Vision): tiles of a canvas as the memory that gated blocks of a LLaMA read.

An image is up to four tiles on a canvas, encoded together (`vlm.tokenizers.mllama`), through one
linear map into a memory; blocks of gated cross-attention stand before some layers of the language
model. In the text an image is one mark, whose vector is a row of the input table past those of the
head. Text sees the image before it, and those that stand side by side with that one.

Published layers are counted through both kinds, the blocks (3, 8, ..., 38 of 40) included; here the
block 3 stands before the language model's third layer, and so on.

Text that sees no image gets nothing from the blocks, as in the authors' code. transformers gives it
the mean of all that its row's images hold, absent tiles included, so that what stands before an
image depends on it. `use_reference_mask` computes that rule, to compare with transformers.

Parameters by pattern, for stages: "tokenizer.*" (the vision encoder), "adaptor.*", "blocks.*",
"text.*". The authors train the first three and leave the language model as it was.

Source: arXiv 2407.21783, section 7; transformers, `mllama`; meta-llama/llama-models,
`models/llama3/multimodal`.
"""

from __future__ import annotations
