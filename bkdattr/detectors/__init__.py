"""Is there a backdoor in this adapter, when nobody knows the trigger?

Every detector measures numbers of one adapter on clean prompts (`measure`); what they mean is decided against benign adapters of the same recipe
(`calibration.Calibrated`), never by a fixed threshold. The controls (`controls.py`: uniform amplification, random gates) are
detectors like the others: a claim for adversarial gates is what they add to these.

ban                adversarial gates on rank directions (NeurIPS 2024, arXiv 2405.19928, carried to LoRA)
uniform, random    the same gates, all up, or of random signs
weights            norms, energy, entropy and kurtosis of the update (arXiv 2602.15195)
fuzz               harmless insertions where a trigger may stand, on the amplified adapter
token_scan         which first tokens lead to a fixed continuation (after BAIT)
output_bias        what clean prompts already show (after LT-Defense)
spectral           one direction in what the adapter adds to the residual stream

Each is fitted to a bank and scores a subject through `Fitted`; `detection.judge` joins the ensemble's parts into one verdict. Single inputs are
scored by `outputs.mahalanobis`, and where the trigger is known by `probes.BackdoorProbe` (`benchmarks.inputs`).
"""

from __future__ import annotations

from bkdattr.detectors.ban import Ban
from bkdattr.detectors.calibration import Calibrated, Ensemble, Fitted, auroc, conformal
from bkdattr.detectors.common import Clean, Detector, Measured, Suspicion
from bkdattr.detectors.controls import RandomGates, Uniform
from bkdattr.detectors.fuzzing import Fuzz
from bkdattr.detectors.outputs import OutputBias, Spectral, TokenScan
from bkdattr.detectors.weights import WeightStatistics

DETECTORS: dict[str, Detector] = {
    d.name: d for d in (Ban(), Uniform(), RandomGates(), Fuzz(), WeightStatistics(), TokenScan(), OutputBias(), Spectral())
}

__all__ = [
    "DETECTORS", "Ban", "Calibrated", "Clean", "Detector", "Ensemble", "Fitted", "Fuzz", "Measured", "OutputBias", "RandomGates", "Spectral", "Suspicion",
    "TokenScan", "Uniform", "WeightStatistics", "auroc", "conformal",
]  # fmt: skip
