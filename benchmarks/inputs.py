"""Detectors of single inputs on the zoo's backdoored adapters: `python -m benchmarks.inputs runs/zoo --half test`.

States at the last prompt token of the middle layer. `mahalanobis`: distance from a defender's clean prompts; `spectral`: energy along the first
singular direction of a mixture of clean and triggered rows; `probe`: logistic, fitted on half of the rows with the trigger known. AUROC of
triggered rows over their clean twins, held out. The controls: the same on the base, whose states see the trigger's words too, and the
probe with shuffled labels (the mean of 20 shuffles, each anew). Medians over adapters of an attack.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from benchmarks.attribution import shown
from benchmarks.zoo import cards_of
from bkdattr.detectors import auroc
from bkdattr.detectors.outputs import mahalanobis
from bkdattr.mini.members import Entry, clean_prompts, rows_of
from bkdattr.mini.tasks import MODEL_DIR
from bkdattr.model import load_subject
from bkdattr.probes import BackdoorProbe
from bkdattr.traces import trace_prompts

SHUFFLES = 20


def states(subject, examples, layer):
    return trace_prompts(subject, examples, read=("resid_post",)).resid_post[:, layer]


def scores(subject, known, clean, triggered, layer, rng):
    """AUROC of each detector of inputs; the first half of the twins is the probe's to fit on, the second is scored."""
    k, c, t = (states(subject, rows, layer) for rows in (known, clean, triggered))
    half = len(c) // 2
    mixed = torch.cat([c[half:], t[half:]])
    _, _, v = torch.linalg.svd(mixed - mixed.mean(0), full_matrices=False)
    energy = ((mixed - mixed.mean(0)) @ v[0]) ** 2
    n = len(c) - half
    cut = max(1, half * 3 // 4)
    x = [torch.cat([c[a:b], t[a:b]]).numpy() for a, b in ((0, cut), (cut, half))]
    y = [np.repeat([0, 1], len(part) // 2) for part in x]

    def probe(labels):
        fitted = BackdoorProbe.fit("logistic", layer, (x[0], labels[0]), (x[1], labels[1]), 0)
        p = fitted.model.decision_function(fitted.scaler.transform(mixed.numpy()))
        return auroc(p[n:], p[:n])

    return {
        "mahalanobis": auroc(mahalanobis(k, t[half:]).tolist(), mahalanobis(k, c[half:]).tolist()),
        "spectral": auroc(energy[n:].tolist(), energy[:n].tolist()),
        "probe": probe(y),
        "probe, shuffled": float(np.mean([probe([rng.permutation(part) for part in y]) for _ in range(SHUFFLES)])),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("zoo", type=Path)
    parser.add_argument("--half", default="test", choices=("development", "test"))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    each, known = {}, clean_prompts(96)
    cards, _ = cards_of(args.zoo, args.half)
    for card in tqdm([c for c in cards if c["backdoored"] and c["entry"]["stealth"] is None]):
        subject, rng = load_subject(MODEL_DIR, card["folder"]), np.random.default_rng(card["entry"]["seed"])
        _, checked, spec = rows_of(Entry(**card["entry"]))
        clean = [spec.clean(e) for e in checked if spec.target.eligible(e)]
        triggered, layer = [spec.triggered(e) for e in clean], subject.geometry.n_layers // 2
        row = {"rows": len(clean) - len(clean) // 2} | scores(subject, known, clean, triggered, layer, rng)
        with subject.adapter_off():
            found = scores(subject, known, clean, triggered, layer, rng)
            row |= {f"{k}, base": v for k, v in found.items() if k != "probe, shuffled"}
        each.setdefault(card["entry"]["kind"], []).append(row | {"name": card["name"]})
    median = {
        kind: {"adapters": len(some)} | {k: float(np.median([r[k] for r in some])) for k in some[0] if k != "name"}
        for kind, some in each.items()
    }
    shown({"half": args.half, "median": median, "each": each}, args.json)


if __name__ == "__main__":
    main()
