def is_causal(mask, constants=None):
    import torch
    return any("le" in n.name for n in mask.graph.nodes) and "attention_mask" not in str(mask.graph)
