"""The core's own metrics, declared as a stranger's package would declare its own. Imports nothing heavy."""

from __future__ import annotations

from foveate.plugins.hooks import hookimpl
from foveate.plugins.specs import MetricSpec

FOVEATE_API = (1, 0)

_METRICS = (
    ("entropy", "entropy:Entropy", "Shannon entropy of the row, at most ln K"),
    (
        "entropy_normalised",
        "entropy:EntropyNormalised",
        "entropy over its largest possible value, H / ln K (Pielou's evenness)",
    ),
    (
        "effective_number",
        "entropy:EffectiveNumber",
        "effective number of keys, exp(H) (Hill number of order 1), from 1 to K",
    ),
    ("top10_mass", "concentration:Top10Mass", "mass of the ceil(K/10) strongest keys"),
    ("top25_mass", "concentration:Top25Mass", "mass of the ceil(K/4) strongest keys"),
    (
        "top10_lift",
        "concentration:Top10Lift",
        "mass of the ceil(K/10) strongest keys over their share of the keys; 1 = uniform",
    ),
    (
        "top25_lift",
        "concentration:Top25Lift",
        "mass of the ceil(K/4) strongest keys over their share of the keys; 1 = uniform",
    ),
    ("above_1x", "concentration:Above1x", "share of keys with p > 1/K"),
    ("above_2x", "concentration:Above2x", "share of keys with p > 2/K, below 1/2"),
    ("above_5x", "concentration:Above5x", "share of keys with p > 5/K, below 1/5"),
    ("max_weight", "concentration:MaxWeight", "largest weight of the row, max p, at least 1/K"),
    ("max_lift", "concentration:MaxLift", "largest weight over the uniform weight, K max p; 1 = uniform"),
    ("gini", "sparsity:Gini", "Gini index, 0 = uniform, at most 1 - 1/K"),
    ("hoyer", "sparsity:Hoyer", "Hoyer's sparseness, 0 = uniform, 1 = one key"),
    (
        "participation_ratio",
        "sparsity:ParticipationRatio",
        "inverse Simpson index, 1 / sum p^2 (Hill number of order 2), from 1 to K",
    ),
    ("spread_raw", "sparsity:SpreadRaw", "standard deviation of the raw weights; at most sqrt(K-1)/K"),
    (
        "spread_minmax",
        "sparsity:SpreadMinMax",
        "standard deviation after scaling the row to [0, 1] by its own extremes",
    ),
    (
        "attention_distance",
        "distance:AttentionDistance",
        "attention-weighted mean distance from the query to its keys",
    ),
    (
        "attention_distance_relative",
        "distance:AttentionDistanceRelative",
        "attention-weighted mean distance over the diagonal of the key grid",
    ),
    (
        "head_divergence",
        "diversity:HeadDivergence",
        "generalised Jensen-Shannon divergence between heads, at most ln min(heads, K)",
    ),
    (
        "head_diversity",
        "diversity:HeadDiversity",
        "Jensen-Shannon divergence between heads over ln min(heads, K); 0 = heads alike, 1 = disjoint",
    ),
    ("prefix_mass", "prefix:PrefixMass", "share of the row on keys that are not patches (CLS, registers, text)"),
    ("self_mass", "prefix:SelfMass", "share of the row on the query's own token"),
    ("received_mass", "received:ReceivedMass", "mean weight that a key receives from the queries (column mean)"),
    ("sink_score", "sinks:SinkScore", "robust z-score of the mass a key receives"),
    (
        "sink_mass",
        "sinks:SinkMass",
        "share of the received mass on sinks (robust z > 3.5 and > 5 x the mean of the keys)",
    ),
    (
        "sink_count",
        "sinks:SinkCount",
        "number of keys that are sinks (robust z > 3.5 and > 5 x the mean of the keys)",
    ),
    (
        "attention_entropy",
        "study:StudyEntropy",
        "entropy as the study computes it; at most ln K; use entropy_normalised",
    ),
    (
        "attention_max",
        "study:StudyMax",
        "largest raw weight (the study never defines it); use max_weight or max_lift",
    ),
    (
        "attention_concentration_top10",
        "study:StudyTop10",
        "mass of the int(0.1 K) strongest patches; use top10_mass or top10_lift",
    ),
    (
        "attention_concentration_top25",
        "study:StudyTop25",
        "mass of the int(0.25 K) strongest patches; use top25_mass or top25_lift",
    ),
    (
        "num_high_attention_patches",
        "study:StudyCount",
        "number of patches above the row's mean; rounding noise on uniform rows; use above_1x",
    ),
    (
        "attention_spread",
        "study:StudySpread",
        "standard deviation of the raw weights; at most sqrt(K-1)/K; use participation_ratio or gini",
    ),
)
"""Name, class below ``foveate.metrics``, what it is (the same words as its ``info.summary``)."""


@hookimpl
def foveate_metrics() -> list[MetricSpec]:
    """Every metric of the core."""
    return [MetricSpec(name, f"foveate.metrics.{target}", summary) for name, target, summary in _METRICS]
