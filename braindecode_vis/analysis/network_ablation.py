"""Which networks of the brain carry the image: Yeo networks left out one by one, and alone, as WAVE reports.

References
----------
WAVE, arXiv:2411.07121 (whole-brain parcels, network ablation); Yeo et al. (2011), doi:10.1152/jn.00338.2011; Schaefer
et al. (2018), doi:10.1093/cercor/bhx179. Of WAVE only the abstract is known here: random groups of the same size and
the paired bootstrap are ours.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from braindecode_vis.analysis.ablation import ablate
from braindecode_vis.analysis.cuts import Columns, Outside
from braindecode_vis.analysis.measure import RetrievalMetric, check_retrieval
from braindecode_vis.analysis.study import Findings, Study
from braindecode_vis.checks import DataError
from braindecode_vis.preprocessing.voxel_geometry import find_networks
from braindecode_vis.settings import Settings


class NetworkAblationConfig(Settings):
    """Decode from the parcels of one network only, and from all but these.

    Parameters
    ----------
    metric
        ``two_way``, ``<k>_way`` or ``top<k>`` among the test images of a fold.
    n_random
        Random sets of as many parcels beside each network.
    outside
        ``cut`` leaves parcels out; ``zero`` sets them to zero, for networks that need them all.
    """

    kind: Literal["network_ablation"] = "network_ablation"
    metric: RetrievalMetric = "two_way"
    n_random: int = Field(default=20, ge=0)
    outside: Outside = "cut"

    def compute(self, study: Study) -> Findings:
        """Fit and test on the parcels of each network, and on random ones."""
        check_retrieval(study, self.kind)
        responses = study.responses
        known = [str(name) for name in responses.coords.get("parcel_networks", ()) if name]
        if "parcel" not in responses.dims or not known:
            raise DataError(
                "the analysis network_ablation needs parcels that belong to networks; average over Schaefer's atlas "
                "with dataset.atlas."
            )
        groups: dict[str, Columns] = {name: find_networks(responses, [name]) for name in dict.fromkeys(known)}
        return ablate(
            study, groups, metric=self.metric, n_random=self.n_random, outside=self.outside, kind=self.kind,
            title="Networks of the brain", noun="parcel",
        )  # fmt: skip
