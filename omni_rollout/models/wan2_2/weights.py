"""The checkpoint's names of the weights that the engine's transformers hold under others."""

from __future__ import annotations

FUSED = {  # fused projection -> the checkpoint's names, in the order of its rows; those of cross-attention are not fused
    ".attn1.to_qkv.": (".attn1.to_q.", ".attn1.to_k.", ".attn1.to_v."),
}
RENAMED = {
    ".to_out.weight": ".to_out.0.weight",
    ".to_out.bias": ".to_out.0.bias",
    ".ffn.net_0.": ".ffn.net.0.",
    ".ffn.net_2.": ".ffn.net.2.",
    "output_scale_shift_prepare.": "",
}
