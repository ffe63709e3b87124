def is_causal(mask, constants=None):
    seen=set(); st=[mask]
    while st:
        n=st.pop()
        if n in seen: continue
        seen.add(n); st+=n.all_input_nodes
    return any("le" in n.name for n in seen) and not any(n.op=="placeholder" and n not in (constants or {}) for n in seen if "sym_size" not in n.name and n.name!="batch" and not all("sym_size" in u.name for u in n.users if u in seen))
