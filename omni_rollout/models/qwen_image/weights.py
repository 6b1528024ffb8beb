"""The checkpoint's names of the weights that the engine's transformer holds under others."""

from __future__ import annotations

FUSED = {  # fused projection -> the checkpoint's names, in the order of its rows
    ".to_qkv.": (".to_q.", ".to_k.", ".to_v."),
    ".add_kv_proj.": (".add_q_proj.", ".add_k_proj.", ".add_v_proj."),
}
RENAMED = {".to_out.weight": ".to_out.0.weight", ".to_out.bias": ".to_out.0.bias"}
