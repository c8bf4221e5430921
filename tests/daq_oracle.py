"""DVIS-DAQ's tracker and refiner once more: float64 numpy, one row, one head, one frame at a time.

Written from the prose description of the algorithm, without a look at the package's modules, whose parameters it
reads by their published names. Slow on purpose.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

Array = NDArray[np.float64]


def softmax(x: Array) -> Array:
    e = np.exp(x - x.max())
    return np.asarray(e / e.sum())


def score(logits: Array) -> float:
    return float(softmax(logits)[:-1].max())


def cosine(a: Array, b: Array) -> float:
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


@dataclass
class OracleTrack:
    start: int
    state: Array
    position: Array
    stored: list[Array]
    seen: list[bool] = field(default_factory=lambda: [True])
    logits: list[Array] = field(default_factory=list)
    masks: list[Array] = field(default_factory=list)
    states: list[Array] = field(default_factory=list)
    misses: int = 0
    dead: bool = False


class Oracle:
    """``weights``: the state dict as float64 arrays; ``config``: a DaqConfig."""

    def __init__(self, weights: dict[str, Array], config: Any) -> None:
        self.w, self.c = weights, config

    # -- layers, each for a list of row vectors

    def linear(self, name: str, x: Array) -> Array:
        y = self.w[f"{name}.weight"] @ x
        return y + self.w[f"{name}.bias"] if f"{name}.bias" in self.w else y

    def norm(self, name: str, x: Array) -> Array:
        z = (x - x.mean()) / np.sqrt(x.var() + 1e-5)
        return np.asarray(z * self.w[f"{name}.weight"] + self.w[f"{name}.bias"])

    def mlp(self, name: str, x: Array) -> Array:
        for i in (0, 1):
            x = np.maximum(self.linear(f"{name}.layers.{i}", x), 0)
        return self.linear(f"{name}.layers.2", x)

    def ffn(self, name: str, x: Array) -> Array:
        y = self.linear(f"{name}.linear2", np.maximum(self.linear(f"{name}.linear1", x), 0))
        return self.norm(f"{name}.norm", x + y)

    def attend(self, name: str, query: Array, keys: list[Array], values: list[Array]) -> Array:
        """Multi-head attention of one query."""
        wq, wk, wv = np.split(self.w[f"{name}.in_proj_weight"], 3)
        bq, bk, bv = np.split(self.w[f"{name}.in_proj_bias"], 3)
        width, heads = len(query), self.c.heads
        d = width // heads
        q = wq @ query + bq
        out = np.zeros(width)
        for h in range(heads):
            part = slice(h * d, (h + 1) * d)
            a = softmax(np.array([q[part] @ (wk @ k + bk)[part] / np.sqrt(d) for k in keys]))
            out[part] = sum(a[j] * (wv @ v + bv)[part] for j, v in enumerate(values))
        return self.linear(f"{name}.out_proj", out)

    def layer(
        self, i: int, x: list[Array], p: list[Array] | None, keys: list[Array], e: list[Array]
    ) -> list[Array]:
        cross, own = (
            f"tracker.transformer_cross_attention_layers.{i}",
            f"tracker.transformer_self_attention_layers.{i}",
        )
        q = x if p is None else [a + b for a, b in zip(x, p, strict=True)]
        x = [
            self.norm(f"{cross}.norm", a + self.attend(f"{cross}.multihead_attn", b, keys, e))
            for a, b in zip(x, q, strict=True)
        ]
        x = [self.norm(f"{own}.norm", a + self.attend(f"{own}.self_attn", a, x, x)) for a in x]
        return [self.ffn(f"tracker.transformer_ffn_layers.{i}", a) for a in x]

    # -- one frame

    def position(self, mask: Array, features: Array) -> Array:
        total, count = np.zeros(len(features)), 0
        for y, x in itertools.product(*map(range, mask.shape)):
            if 1 / (1 + np.exp(-mask[y, x])) > 0.5:
                total, count = total + features[:, y, x], count + 1
        return self.mlp("tracker.pos_embed", total / (count + 1e-8))

    def predict(self, x: Array, features: Array) -> tuple[Array, Array]:
        normed = self.norm("tracker.decoder_norm", x)
        weight = self.mlp("tracker.mask_embed", normed)
        kernel, bias = (
            self.w["tracker.mask_feature_proj.weight"][:, :, 0, 0],
            self.w["tracker.mask_feature_proj.bias"],
        )
        projected = np.einsum("oc,cyx->oyx", kernel, features) + bias[:, None, None]
        return self.linear("tracker.class_embed", normed), np.einsum("c,cyx->yx", weight, projected)

    def gate(self, live: list[OracleTrack], e: list[Array]) -> list[float]:
        if not live:
            return []
        background = list(self.w["tracker.bg_slots.weight"])
        u = [t.state for t in live] + background
        z = [t.position for t in live] + background
        feats = self.w["segmenter.model.transformer_module.queries_features.weight"]
        likeness = np.array([[cosine(row, q) for q in feats] for row in u])
        index = likeness.argmax(1)
        for row, query in zip(*linear_sum_assignment(1 - likeness), strict=True):
            index[row] = query
        s = [feats[i] for i in index]
        for i in range(self.c.tracker.layers):
            name = f"tracker.slot_cross_attention_layers.{i}"
            y = [self.attend(f"{name}.multihead_attn", a + b, e, e) for a, b in zip(s, u, strict=True)]
            inputs = [self.norm(f"{name}.slot_attn.norm_inputs", a + b) for a, b in zip(s, y, strict=True)]
            keys = [self.linear(f"{name}.slot_attn.project_k", a) for a in inputs]
            queries = [
                self.linear(f"{name}.slot_attn.project_q.1", self.norm(f"{name}.slot_attn.project_q.0", a))
                for a in z
            ]
            a = np.array([softmax(np.array([k @ q for q in queries]) / np.sqrt(len(k))) for k in keys]) + 1e-6
            a = a / a.sum(0, keepdims=True)
            s = [
                self.norm(f"{name}.norm", s[m] + sum(a[n, m] * y[n] for n in range(len(y)))) for m in range(len(s))
            ]
            s = [self.ffn(f"tracker.slot_ffn_layers.{i}", row) for row in s]
        return [
            score(self.linear("tracker.class_embed", self.norm("tracker.decoder_norm", row)))
            for row in s[: len(live)]
        ]

    def run(self, logits: Array, masks: Array, embeds: Array, features: Array) -> list[OracleTrack]:
        """Segmenter outputs with a leading frame axis, to all tracks in the order of their birth."""
        rules, tracks = self.c.tracker, []
        for t in range(len(embeds)):
            e, live = list(embeds[t]), [track for track in tracks if not track.dead]
            if t == 0:
                x = e
                for i in range(rules.layers):
                    x = self.layer(i, x, None, e, e)
                valid = [score(row) > rules.first_threshold for row in logits[0]]
            else:
                anchors = [self.position(mask, features[t]) for mask in masks[t]]
                x = [track.state for track in live] + [self.w["tracker.new_ins_embeds.weight"][0]] * len(e)
                p = [track.position for track in live] + anchors
                for i in range(rules.layers):
                    x = self.layer(i, x, p, [a + b for a, b in zip(e, anchors, strict=True)], e)
                gate = self.gate(live, e)
            said = [self.predict(row, features[t]) for row in x]
            if t:
                valid = [score(row) > rules.select_threshold for row, _ in said]
                if rules.ovis_rule:
                    valid = [v and (r >= len(live) or gate[r] > rules.keep_threshold) for r, v in enumerate(valid)]
            for row, (cls, mask) in enumerate(said):
                if row < len(live):
                    self._carry(live[row], x[row], cls, mask, valid[row], features[t])
                elif valid[row]:
                    p0 = self.position(mask, features[t])
                    tracks.append(OracleTrack(t, x[row], p0, [p0], logits=[cls], masks=[mask], states=[x[row]]))
        return tracks

    def _carry(self, track: OracleTrack, x: Array, cls: Array, mask: Array, valid: bool, features: Array) -> None:
        track.misses = 0 if valid else track.misses + 1
        if track.misses == self.c.tracker.patience:
            track.dead = True
            return
        track.state = x
        track.seen.append(valid)
        track.logits.append(cls)
        track.masks.append(mask)
        track.states.append(x)
        if valid:
            new = self.position(mask, features)
            past = track.stored[-(self.c.tracker.position_cache - 1) :]
            beta = max(0.0, float(np.mean([cosine(old, new) for old in past])))
            track.position = (1 - beta) * track.position + beta * new
            track.stored.append(new)

    # -- the refiner

    def refine(self, instances: Array, embeds: Array) -> tuple[Array, Array, Array]:
        """(instance, frame, channel), (frame, query, channel) -> class logits, importance, mask embeddings."""
        x = instances.copy()
        count, length, _ = x.shape
        pairs = list(itertools.product(range(count), range(length)))
        for i in range(self.c.refiner.layers):
            time, own = (
                f"refiner.transformer_time_self_attention_layers.{i}",
                f"refiner.transformer_obj_self_attention_layers.{i}",
            )
            cross = f"refiner.transformer_cross_attention_layers.{i}"
            y = x.copy()
            for n, t in pairs:
                y[n, t] = self.norm(
                    f"{time}.norm", x[n, t] + self.attend(f"{time}.self_attn", x[n, t], list(x[n]), list(x[n]))
                )
            if self.c.refiner.local_attention:
                y = self._short_term(y, i)
            x = y.copy()
            for n, t in pairs:
                x[n, t] = self.norm(
                    f"{own}.norm", y[n, t] + self.attend(f"{own}.self_attn", y[n, t], list(y[:, t]), list(y[:, t]))
                )
            for n, t in pairs:
                read = self.attend(f"{cross}.multihead_attn", x[n, t], list(embeds[t]), list(embeds[t]))
                x[n, t] = self.ffn(
                    f"refiner.transformer_ffn_layers.{i}", self.norm(f"{cross}.norm", x[n, t] + read)
                )
        normed = np.array([[self.norm("refiner.decoder_norm", row) for row in one] for one in x])
        importance = np.array(
            [softmax(np.array([self.linear("refiner.activation_proj", r)[0] for r in one])) for one in normed]
        )
        logits = np.array(
            [self.linear("refiner.class_embed", a @ one) for a, one in zip(importance, normed, strict=True)]
        )
        embed = np.array([[self.mlp("refiner.mask_embed", row) for row in one] for one in normed])
        return logits, importance, embed

    def _short_term(self, x: Array, i: int) -> Array:
        name = f"refiner.conv_short_aggregate_layers.{i}"
        y = np.maximum(self._conv(f"{name}.0", x), 0)
        z = x + self._conv(f"{name}.2", y)
        return np.array([[self.norm(f"refiner.conv_norms.{i}", row) for row in one] for one in z])

    def _conv(self, name: str, x: Array) -> Array:
        weight, bias = self.w[f"{name}.weight"], self.w[f"{name}.bias"]
        half, last = weight.shape[2] // 2, x.shape[1] - 1
        y = np.zeros_like(x)
        for n, t in itertools.product(range(len(x)), range(x.shape[1])):
            taps = [weight[:, :, half + k] @ x[n, min(max(t + k, 0), last)] for k in range(-half, half + 1)]
            y[n, t] = sum(taps) + bias
        return y


def chains(embeds: Array) -> list[list[int]]:
    """Queries of each frame in the order of the first, by trying every permutation."""
    order = [list(range(embeds.shape[1]))]
    for before, now in itertools.pairwise(embeds):
        old = before[order[-1]]
        best = max(
            itertools.permutations(range(len(now))),
            key=lambda p: sum(cosine(a, now[j]) for a, j in zip(old, p, strict=True)),
        )
        order.append(list(best))
    return order
