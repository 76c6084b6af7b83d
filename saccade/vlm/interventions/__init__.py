"""Published interventions, one file each."""

from saccade.vlm.interventions.act import ACT
from saccade.vlm.interventions.gift import GIFT
from saccade.vlm.interventions.pai import PAI
from saccade.vlm.interventions.vaf import VAF
from saccade.vlm.interventions.var import VAR
from saccade.vlm.interventions.vhr import VHR

__all__ = ["ACT", "GIFT", "PAI", "VAF", "VAR", "VHR"]
