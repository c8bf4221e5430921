"""Small models that attend as old installations do, and one that keeps tracks as DVIS-DAQ's code does.

The tracker's decisions are drawn beforehand, so that a test knows every birth and death. Weights are enlarged:
random attention is almost uniform, and equality on it proves nothing.
"""

from __future__ import annotations

import importlib.util
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foveate_dvis.exporter.__main__ import EXPORTER

WIDTH, HEADS, QUERIES, SLOTS, CLASSES, PATIENCE = 16, 2, 5, 2, 3, 2
HEIGHT, COLUMNS, WINDOW = 32, 64, 5
GRIDS = ((1, 2), (2, 4), (4, 8))


def exporter(folder: Path) -> Any:
    """The exporter, copied somewhere else and loaded as a user does: as a file, not as part of foveate."""
    copy = folder / "foveate_export.py"
    copy.write_text(EXPORTER.read_text(encoding="utf-8"), encoding="utf-8")
    spec = importlib.util.spec_from_file_location("foveate_export", copy)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def sharpened(model: nn.Module, seed: int = 0) -> nn.Module:
    """The model in eval mode with matrices so large that attention is peaked."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) * (0.5 if weight.dim() > 1 else 0.1))
    return model.eval()


class Deformable(nn.Module):
    """Multi-scale deformable attention with the usual names, corner by corner: independent of grid_sample."""

    def __init__(self, levels: int = 2, points: int = 3) -> None:
        super().__init__()
        self.n_heads, self.n_levels, self.n_points = HEADS, levels, points
        self.sampling_offsets = nn.Linear(WIDTH, HEADS * levels * points * 2)
        self.attention_weights = nn.Linear(WIDTH, HEADS * levels * points)
        self.value_proj, self.output_proj = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(
        self, query: Tensor, reference_points: Tensor, input_flatten: Tensor, input_spatial_shapes: Tensor,
        input_level_start_index: Tensor, input_padding_mask: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        values = self.value_proj(input_flatten)
        if input_padding_mask is not None:
            values = values.masked_fill(input_padding_mask[..., None], 0.0)
        batch, queries = query.shape[:2]
        shape = (batch, queries, HEADS, self.n_levels, self.n_points)
        self.seen = F.softmax(self.attention_weights(query).view(*shape[:3], -1), -1).view(shape)
        offsets = self.sampling_offsets(query).view(*shape, 2)
        sizes = input_spatial_shapes.tolist()
        scale = torch.tensor([[columns, rows] for rows, columns in sizes])[None, None, None, :, None]
        self.where = reference_points[:, :, None, :, None] + offsets / scale
        heads = values.view(batch, -1, HEADS, WIDTH // HEADS)
        out = torch.zeros(batch, queries, HEADS, WIDTH // HEADS)
        for b, q, h, level, p in torch.cartesian_prod(*(torch.arange(size) for size in shape)).tolist():
            rows, columns = sizes[level]
            start = int(input_level_start_index[level])
            x, y = (self.where[b, q, h, level, p] * torch.tensor([columns, rows]) - 0.5).tolist()
            left, top = int(x // 1), int(y // 1)
            for i, j in ((top, left), (top, left + 1), (top + 1, left), (top + 1, left + 1)):
                share = (1 - abs(y - i)) * (1 - abs(x - j)) * float(self.seen[b, q, h, level, p])
                if 0 <= i < rows and 0 <= j < columns:
                    out[b, q, h] += share * heads[b, start + i * columns + j, h]
        return self.output_proj(out.flatten(2))


class Slots(nn.Module):
    """Slot attention by the published names."""

    def __init__(self) -> None:
        super().__init__()
        self.eps, self.attn_scale = 1e-6, WIDTH**-0.5
        self.norm_inputs = nn.LayerNorm(WIDTH)
        self.project_q = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH, bias=False))
        self.project_k = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, inputs: Tensor, inputs_k: Tensor, slots: Tensor) -> Tensor:
        scores = (
            self.project_k(self.norm_inputs(inputs_k)) @ self.project_q(slots).transpose(1, 2) * self.attn_scale
        )
        weights = F.softmax(scores, -1) + self.eps
        self.seen = weights / weights.sum(1, keepdim=True)
        return (self.seen.transpose(1, 2) @ inputs).transpose(0, 1)


class Attention(nn.Module):
    """Self-attention with a softmax of its own, heads in the batch, as in detectron2's plain ViT."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = HEADS
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens = x.shape[:2]
        parts = self.qkv(x).view(batch, tokens, 3, HEADS, -1).permute(2, 0, 3, 1, 4).flatten(1, 2)
        self.seen = (parts[0] @ parts[1].transpose(1, 2) * parts[0].shape[-1] ** -0.5).softmax(dim=-1)
        return self.proj((self.seen @ parts[2]).view(batch, HEADS, tokens, -1).transpose(1, 2).flatten(2))


class Layer(nn.Module):
    """``multihead_attn`` or ``self_attn`` of the published layers: (row, batch, channel)."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.add_module(name, nn.MultiheadAttention(WIDTH, HEADS))

    def forward(self, tgt: Tensor, memory: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        memory = tgt if memory is None else memory
        return F.layer_norm(tgt + getattr(self, self.name)(tgt, memory, memory, attn_mask=mask)[0], (WIDTH,))


class SlotLayer(nn.Module):
    """The gate's layer."""

    def __init__(self) -> None:
        super().__init__()
        self.multihead_attn, self.slot_attn = nn.MultiheadAttention(WIDTH, HEADS), Slots()

    def forward(self, tgt: Tensor, memory: Tensor, slots: Tensor) -> Tensor:
        read = self.multihead_attn(query=tgt, key=memory, value=memory)[0]
        told = self.slot_attn(read.transpose(0, 1), (tgt + read).transpose(0, 1), slots.transpose(0, 1))
        return F.layer_norm(tgt + told, (WIDTH,))


class Predictor(nn.Module):
    """Queries read one map a layer, masked, and then one another."""

    def __init__(self) -> None:
        super().__init__()
        self.query_feat = nn.Embedding(QUERIES, WIDTH)
        self.transformer_cross_attention_layers = nn.ModuleList(Layer("multihead_attn") for _ in GRIDS)
        self.transformer_self_attention_layers = nn.ModuleList(Layer("self_attn") for _ in GRIDS)
        self.class_head = nn.Linear(WIDTH, CLASSES + 1)

    def forward(self, maps: list[Tensor]) -> tuple[Tensor, Tensor]:
        frames = maps[0].shape[1]
        queries = self.query_feat.weight[:, None].repeat(1, frames, 1)
        for i, memory in enumerate(maps):
            mask = torch.rand(frames, QUERIES, len(memory), generator=torch.Generator().manual_seed(i)) < 0.4
            mask[mask.all(-1)] = False
            queries = self.transformer_cross_attention_layers[i](queries, memory, mask.repeat_interleave(HEADS, 0))
            queries = self.transformer_self_attention_layers[i](queries)
        return self.class_head(queries).transpose(0, 1), queries.permute(2, 1, 0)


class Head(nn.Module):
    """``sem_seg_head``: (1, frame, query, class + 1) logits and (1, channel, frame, query) embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.num_classes = CLASSES
        self.stem, self.predictor = nn.Conv2d(3, WIDTH, 1), Predictor()
        self.pixel_decoder = nn.Module()
        self.pixel_decoder.transformer = nn.Module()
        self.pixel_decoder.transformer.encoder = nn.Module()
        self.pixel_decoder.transformer.encoder.layers = nn.ModuleList([nn.Identity()])

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        features = self.stem(images)
        maps = [F.adaptive_avg_pool2d(features, grid).flatten(2).permute(2, 0, 1) for grid in GRIDS]
        logits, embeds = self.predictor(maps)
        masks = torch.einsum("ctq,tchw->qthw", embeds, F.avg_pool2d(features, 4))
        return {"pred_logits": logits[None], "pred_embds": embeds[None], "pred_masks": masks[None]}


class Tracker(nn.Module):
    """Rows, births and deaths as the published tracker keeps them, after a plan instead of scores."""

    def __init__(self, plan: random.Random) -> None:
        super().__init__()
        self.num_layers, self.hidden_dim, self.num_heads = 2, WIDTH, HEADS
        self.num_new_ins, self.num_slots, self.kick_out_frame_num = QUERIES, SLOTS, PATIENCE
        self.inference_select_thr, self.keep_threshold, self.ovis_infer = 0.1, 0.01, True
        layers = range(self.num_layers)
        self.transformer_cross_attention_layers = nn.ModuleList(Layer("multihead_attn") for _ in layers)
        self.transformer_self_attention_layers = nn.ModuleList(Layer("self_attn") for _ in layers)
        self.transformer_ffn_layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in layers)
        self.slot_cross_attention_layers = nn.ModuleList(SlotLayer() for _ in layers)
        self.class_embed = nn.Linear(WIDTH, CLASSES + 1)
        self.new_ins_embeds, self.bg_slots = nn.Embedding(1, WIDTH), nn.Embedding(SLOTS, WIDTH)
        self.plan, self.last_seq_ids = plan, None
        self.video_ins_hub: dict[int, Any] = {}
        self.told: list[dict[str, Any]] = []

    def inference(self, embeds: Tensor, start: int, resume: bool = False) -> None:
        """``embeds`` (frame, query, channel)."""
        for i, frame in enumerate(embeds):
            memory, carried = frame[:, None], list(self.last_seq_ids or [])
            rows = memory
            if start + i:
                tracks = [self.video_ins_hub[seq].embeds[-1] for seq in carried]
                queries = torch.stack(tracks)[:, None] if tracks else memory[:0]
                rows = torch.cat([queries, self.new_ins_embeds.weight[:, None] + memory])
            for cross, own, last in zip(
                self.transformer_cross_attention_layers, self.transformer_self_attention_layers,
                self.transformer_ffn_layers, strict=True,
            ):  # fmt: skip
                rows = last(own(cross(rows, memory)))
            logits = self.class_embed(rows.transpose(0, 1)[None])
            if start + i:
                slots = torch.cat([queries, self.bg_slots.weight[:, None]])
                gate = slots
                for layer in self.slot_cross_attention_layers:
                    gate = layer(gate, memory, slots)
                self.class_embed(gate.transpose(0, 1)[None])
            self._decide(start + i, rows[:, 0], logits[0, 0], carried)

    def _decide(self, time: int, rows: Tensor, logits: Tensor, carried: list[int]) -> None:
        now, births, deaths = [], [], []
        for row in range(len(rows)):
            valid = self.plan.random() < (0.6 if row < len(carried) else 0.35)
            known = row < len(carried)
            seq = carried[row] if known else self.plan.randrange(100000)
            if valid and not known:
                self.video_ins_hub[seq] = SimpleNamespace(
                    sT=time, appearance=[], dead=False, embeds=[], logits=[], missed=0
                )
                births.append((row, seq))
            if not valid and not known:
                continue
            track = self.video_ins_hub[seq]
            track.missed = 0 if valid else track.missed + 1
            if track.missed >= PATIENCE:
                track.dead = True
                deaths.append(seq)
                continue
            track.appearance.append(valid)
            track.embeds.append(rows[row])
            track.logits.append(logits[row])
            now.append(seq)
        self.told.append({"births": births, "deaths": deaths, "carried": carried})
        self.last_seq_ids = now


class Model(nn.Module):
    """Online: windows through the segmenter, then the tracker; answers are the tracks."""

    def __init__(self, seed: int = 3) -> None:
        super().__init__()
        self.sem_seg_head, self.tracker = Head(), Tracker(random.Random(seed))
        self.size_divisibility, self.max_num, self.aux_inference_select_thr, self.noise_frame_num = 32, 4, 0.01, 1
        self.register_buffer("pixel_mean", torch.full((3, 1, 1), 120.0), False)
        self.register_buffer("pixel_std", torch.full((3, 1, 1), 60.0), False)
        self.metadata = SimpleNamespace(thing_classes=["cod", "wrasse", "eel"])

    def run_window_inference(self, images_tensor: Tensor) -> dict[str, Any]:
        for start in range(0, len(images_tensor), WINDOW):
            out = self.sem_seg_head(images_tensor[start : start + WINDOW])
            self.tracker.inference(out["pred_embds"][0].permute(1, 2, 0), start)
        size = [side // 4 for side in images_tensor.shape[-2:]]
        tracks = self.tracker.video_ins_hub.items()
        masks = [torch.full((len(images_tensor), *size), -1e4) for _ in tracks]
        for mask, (_, track) in zip(masks, tracks, strict=True):
            mask[track.sT : track.sT + len(track.embeds)] = torch.stack(track.embeds)[:, 0, None, None]
        logits = torch.stack([torch.stack(track.logits).mean(0) for _, track in tracks])
        ids = torch.tensor([seq for seq, _ in tracks])
        return {"pred_logits": logits[None], "pred_masks": torch.stack(masks)[None], "pred_ids": ids[None]}

    def forward(self, batched_inputs: list[dict[str, Any]]) -> dict[str, Any]:
        images = torch.stack([frame.float() for frame in batched_inputs[0]["image"]])
        return self.run_window_inference((images - self.pixel_mean) / self.pixel_std)


def clip(frames: int = 7, seed: int = 0) -> Tensor:
    """uint8 (frame, 3, y, x)."""
    return torch.randint(
        0, 256, (frames, 3, HEIGHT, COLUMNS), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )
