"""FID and Inception score (IS) as torch-fidelity computes them.

Protocol: the Inception network of 2015 that TensorFlow's FID used, converted by torch-fidelity ("inception-v3-compat"); images
as bytes, grey ones repeated to three channels, resized to 299x299 inside the network as TensorFlow 1 did; FID of the 2,048
pooled features (Heusel et al. 2017, eq. 6); IS of the class scores without bias (Salimans et al. 2016): the mean over 10 splits
of a permutation with the fixed seed 2020. Numbers depend on how many images go in; compare equal numbers only.

Nothing is downloaded here. The weights are a pickle, which can run any code when it is opened, so only the very bytes that
`SHA256` belongs to are ever opened.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from nsgf.config import INCEPTION_SPLITS
from nsgf.torchvision_cpu import import_torchvision
from repro.errors import BadInput
from repro.runtime import progress

WEIGHTS = "weights-inception-2015-12-05-6726825d.pth"
SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{WEIGHTS}"

FEATURES = "2048"
SPLIT_SEED = 2020


def find_weights(data_root: Path) -> Path | None:
    """The weights in the data root or in torch.hub's folder, None where they are not or are not those of `SHA256`."""
    for path in _places(data_root):
        if path.is_file() and _sha256(path.read_bytes()) == SHA256:
            return path
    return None


def missing(data_root: Path) -> str:
    """One line for where there are no weights: what was found, where they belong, where to get them."""
    there = [path for path in _places(data_root) if path.is_file()]
    found = f"found {there[0]} with another SHA-256" if there else f"found no {WEIGHTS}"
    folders = " or ".join(str(path.parent) for path in _places(data_root))
    return f"{found}, expected SHA-256 {SHA256[:8]}... in {folders}; it is at {URL}"


def scores(
    judged: Mapping[str, Tensor], reference: Tensor, weights: Path | None, device: torch.device, batch_size: int = 64
) -> dict[str, float]:
    """`<name>.fid` against the reference and `<name>.inception_score` of each set of images, uint8 (n, 1 or 3, s, s).

    `batch_size` is that of the network, which sees every image at 299x299. Without weights a `StandIn` takes its place, and
    the numbers mean nothing. Raises BadInput when the weights are not those of `SHA256`.
    """
    import_torchvision()  # torch-fidelity imports it, and that fails beside a CPU build of torch
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, isc_features_to_metric

    network = (StandIn() if weights is None else load_network(weights)).to(device)
    expected = fid_features_to_statistics(look(network, reference, device, batch_size)[0])
    found = {}
    for name, pixels in judged.items():
        features, logits = look(network, pixels, device, batch_size)
        fid = fid_statistics_to_metric(fid_features_to_statistics(features), expected, verbose=False)
        score = isc_features_to_metric(logits, splits=INCEPTION_SPLITS, shuffle=True, rng_seed=SPLIT_SEED)
        found |= {f"{name}.fid": fid[KEY_METRIC_FID], f"{name}.inception_score": score[KEY_METRIC_ISC_MEAN]}
    return found


def load_network(weights: Path) -> nn.Module:
    """torch-fidelity's extractor, which gives the features of FID and the class scores of IS. Raises BadInput for other bytes."""
    content = weights.read_bytes()
    if _sha256(content) != SHA256:
        raise BadInput(f"{weights}: found SHA-256 {_sha256(content)[:8]}..., expected {SHA256[:8]}...; it is at {URL}")
    import_torchvision()
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    # The bytes that were checked and not the path: what lies there could have changed in between.
    return FeatureExtractorInceptionV3(
        "inception-v3-compat", [FEATURES, "logits_unbiased"], feature_extractor_weights_path=io.BytesIO(content)
    )


class StandIn(nn.Module):
    """Bytes (n, 3, s, s) to features (n, 16) and class scores (n, 1008) that mean nothing: for a rehearsal without the weights."""

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        features = nn.functional.adaptive_avg_pool2d(pixels.float(), 4).mean(1).flatten(1)
        return features, features.repeat(1, 63)


def look(network: nn.Module, pixels: Tensor, device: torch.device, batch_size: int) -> tuple[Tensor, Tensor]:
    """Features (n, 2048) and class scores (n, 1008) of images, on the CPU."""
    parts = []
    with torch.no_grad():
        for chunk in progress(pixels.split(batch_size), "inception"):
            in_colour = chunk.to(device).expand(-1, 3, -1, -1)
            parts.append([column.cpu() for column in network(in_colour)])
    features, logits = (torch.cat(column) for column in zip(*parts, strict=True))
    return features, logits


def _places(data_root: Path) -> list[Path]:
    return [data_root / WEIGHTS, Path(torch.hub.get_dir()) / "checkpoints" / WEIGHTS]


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
