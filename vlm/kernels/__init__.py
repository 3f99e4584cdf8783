"""CPU kernels, each with its slow twin."""

WHOLE_PRODUCTS = "vlm_whole_products"
"""The name by which transformers knows our attention of vision encoders
(`vlm.kernels.encoder_attention`), which differs from "sdpa" in speed alone."""
