"""Slow and obvious: one prompt at a time, no batching, no padding, no cache, hooks by hand. The oracle of the fast code."""

import torch


def response_probability(causal_lm, prompt, response):
    """exp of the mean log p of the response's tokens, token by token, from a fresh forward each."""
    total = 0.0
    for t in range(len(response)):
        ids = torch.tensor([[*prompt, *response[:t]]])
        with torch.no_grad():
            logits = causal_lm(input_ids=ids, use_cache=False).logits[0, -1].double()
        total += float(logits.log_softmax(-1)[response[t]])
    return float(torch.tensor(total / len(response)).exp())


def z_at_last_token(causal_lm, out_projs, prompt):
    """z of every layer at the prompt's last token: [layer, n_heads * d_head]."""
    seen = []
    handles = [m.register_forward_pre_hook(lambda mod, args: seen.append(args[0][0, -1].clone())) for m in out_projs]
    with torch.no_grad():
        causal_lm(input_ids=torch.tensor([prompt]), use_cache=False)
    for h in handles:
        h.remove()
    return torch.stack(seen)


def patched_probability(causal_lm, out_proj, n_heads, head, value, prompt, response):
    """The response probability with one head's z replaced at the prompt's last token."""
    at = len(prompt) - 1

    def hook(module, args):
        z = args[0].clone()
        d = z.shape[-1] // n_heads
        z[0, at, head * d : (head + 1) * d] = value
        return (z, *args[1:])

    handle = out_proj.register_forward_pre_hook(hook)
    try:
        return response_probability(causal_lm, prompt, response)
    finally:
        handle.remove()


def site_module(subject, site):
    sites = subject.sites[site.layer]
    return sites.mlp if site.kind == "mlp" else sites.out_proj


def site_at_last_token(subject, site, prompt):
    """What a head's z, an attention output or an MLP output is at the prompt's last token."""
    seen = []
    if site.head is not None:
        handle = site_module(subject, site).register_forward_pre_hook(lambda mod, args: seen.append(args[0][0, -1].clone()))
    else:
        handle = site_module(subject, site).register_forward_hook(
            lambda mod, args, out: seen.append(out.flatten(0, -2)[-1].clone())
        )
    with torch.no_grad():
        subject.causal_lm(input_ids=torch.tensor([prompt]), use_cache=False)
    handle.remove()
    d = subject.geometry.d_head
    return seen[0] if site.head is None else seen[0][site.head * d : (site.head + 1) * d]


def patched_site_probability(subject, site, donors, prompt, response):
    """The response probability with a site replaced by its mean over the donors at the prompt's last token."""
    value = torch.stack([site_at_last_token(subject, site, p) for p in donors]).mean(0)
    if site.head is not None:
        return patched_probability(
            subject.causal_lm, site_module(subject, site), subject.geometry.n_heads, site.head, value, prompt, response
        )

    def hook(module, args, out):
        changed = out.clone()
        changed.view(-1, changed.shape[-1])[len(prompt) - 1] = value
        return changed

    handle = site_module(subject, site).register_forward_hook(hook)
    try:
        return response_probability(subject.causal_lm, prompt, response)
    finally:
        handle.remove()


def acie(subject, donors, recipients, responses):
    """ACIE per head by the definition, all loops written out."""
    n_heads, d = subject.geometry.n_heads, subject.geometry.d_head
    projs = [s.out_proj for s in subject.sites]
    zbar = torch.stack([z_at_last_token(subject.causal_lm, projs, p) for p in donors]).mean(0)
    out = torch.zeros(subject.geometry.n_layers, n_heads)
    for layer, proj in enumerate(projs):
        for head in range(n_heads):
            value = zbar[layer, head * d : (head + 1) * d]
            effects = [
                patched_probability(subject.causal_lm, proj, n_heads, head, value, p, r)
                - response_probability(subject.causal_lm, p, r)
                for p, r in zip(recipients, responses, strict=True)
            ]
            out[layer, head] = sum(effects) / len(effects)
    return out


def greedy(causal_lm, prompt, end_ids, max_new_tokens):
    """Argmax decoding without a cache, one prompt."""
    ids = list(prompt)
    for _ in range(max_new_tokens):
        with torch.no_grad():
            ids.append(int(causal_lm(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        if ids[-1] in end_ids:
            break
    return ids[len(prompt) :]


def resid_at_last_token(subject, layer, prompt):
    """The output of a decoder layer at the prompt's last token."""
    seen = []

    def hook(_module, _args, out):
        seen.append((out[0] if isinstance(out, tuple) else out)[0, -1].clone())

    handle = subject.sites[layer].layer.register_forward_hook(hook)
    with torch.no_grad():
        subject.causal_lm(input_ids=torch.tensor([prompt]), use_cache=False)
    handle.remove()
    return seen[0]
