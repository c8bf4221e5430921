"""The analysis ``approximations`` on attention that a detector makes itself: values are known, q and k are not."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

from detr_models import photos, tiny
from foveate.capture.trace import trace
from foveate.study.detection_model import approximations


def subject(name: str) -> SimpleNamespace:
    source = tiny(name)
    batch = source.encode(photos((64, 64), (64, 64)))
    return SimpleNamespace(
        source=source,
        positions=[0, 1],
        seed=0,
        batches=lambda: iter([([0, 1], batch)]),
        batch=batch,
        run=SimpleNamespace(model_id=name),
    )


@pytest.mark.parametrize("name", ["Table Transformer", "DAB-DETR", "Mask2Former", "OneFormer"])
def test_every_family_has_sites_to_approximate(name: str) -> None:
    found = list(approximations(subject(name)))
    sites = {one.site for one in found}
    assert any(site.startswith("decoder") for site in sites), sites
    for one in found:
        known = np.asarray(one.values)[np.isfinite(one.values)]
        assert (known >= 0).all()
        # The first layer's queries are zero in these models: there is no output to be a share of.
        assert known.size == 2 or (one.site == "decoder.self" and one.layer == 0), one


def test_the_sparse_error_of_a_made_softmax_against_loops() -> None:
    asked = subject("Table Transformer")
    found = {
        (one.site, one.layer): one
        for one in approximations(asked)
        if one.quantity.startswith("output error, sparse")
    }
    record = next(
        r
        for call, r in trace(asked.source, asked.batch, grad=True).records.items()
        if call.site == "decoder.cross"
    )
    rows, values = record.rows(slice(None)).double().numpy(), record.v.double().numpy()
    budget = max(1, round(rows.shape[-1] / 8))
    errors = np.zeros(rows.shape[:2])
    for b, h in np.ndindex(*errors.shape):
        cheap = np.zeros_like(rows[b, h])
        for i, row in enumerate(rows[b, h]):
            top = sorted(range(row.size), key=lambda j: (-row[j], j))[:budget]
            for j in top:
                cheap[i, j] = row[j] * row.sum() / sum(row[k] for k in top)
        whole = rows[b, h] @ values[b, h]
        errors[b, h] = np.linalg.norm(whole - cheap @ values[b, h]) / np.linalg.norm(whole)
    np.testing.assert_allclose(found["decoder.cross", 0].values, errors.mean(1), rtol=1e-5)


def test_values_are_those_that_the_model_multiplied_with() -> None:
    asked = subject("Table Transformer")
    for call, record in trace(asked.source, asked.batch, grad=True).records.items():
        if record.v is None:  # deformable, or shared by heads
            continue
        made = record.rows(slice(None)) @ record.v
        torch.testing.assert_close(made, record.out.reshape(made.shape), atol=1e-5, rtol=1e-4, msg=str(call))
